"""ESM C's weights: a Hugging Face folder of safetensors, or the .pth file of the esm package's first releases.

Three layouts exist: that of transformers, that of the first releases, and that of Transformer Engine, in which Biohub
published the safetensors.
"""

import re
from pathlib import Path
from typing import Any

from seqmill.base.files import read_json
from seqmill.errors import SeqmillError
from seqmill.model.esm2 import LAYER_NORM_EPS, ROPE_BASE
from seqmill.model.esmc import parameter_shapes
from seqmill.model.tensor_files import (
    SIZES,
    Naming,
    Tensors,
    load_pickled,
    load_safetensors,
    read_architecture,
    require_tensors,
)
from seqmill.spec.architectures import EsmcArchitecture
from seqmill.spec.models import CONFIG
from seqmill.spec.weight_files import weight_files

HEAD_DIM = 64  # of every released model
HUGGING_FACE = Naming(
    prefix=r"^esmc\.",  # present if the file has a head on top of the encoder
    whole={"embed": "embed_tokens", "final_norm": "norm"},
    layer="layers.{}.",
    parts={
        "attention_norm": ("input_layernorm",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "q_norm": ("self_attn.q_norm",),
        "k_norm": ("self_attn.k_norm",),
        "out": ("self_attn.o_proj",),
        "ffn_norm": ("post_attention_layernorm",),
        "gated": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    },
    ignored=r"^lm_head\.|\.(original_)?inv_freq$",
)
FIRST_RELEASES = Naming(
    prefix=r"^esmc\.",
    whole={"embed": "embed", "final_norm": "transformer.norm"},
    layer="transformer.blocks.{}.",
    parts={
        "attention_norm": ("attn.layernorm_qkv.0",),
        "qkv": ("attn.layernorm_qkv.1",),
        "q_norm": ("attn.q_ln",),
        "k_norm": ("attn.k_ln",),
        "out": ("attn.out_proj",),
        "ffn_norm": ("ffn.0",),
        "gated": ("ffn.1",),
        "down": ("ffn.3",),
    },
    ignored=r"^(sequence|lm)_head\.|\.inv_freq$",
)
TRANSFORMER_ENGINE = Naming(
    prefix=r"^esmc\.",
    whole=FIRST_RELEASES.whole,
    layer=FIRST_RELEASES.layer,
    parts={
        **FIRST_RELEASES.parts,
        "attention_norm": ("attn.layernorm_qkv.layer_norm",),
        "qkv": ("attn.layernorm_qkv",),
        "ffn_norm": ("ffn.layer_norm",),
        "gated": ("ffn.fc1",),
        "down": ("ffn.fc2",),
    },
    ignored=r"^lm_head\.|\._extra_state$|\.inv_freq$",
)
ENGINE_NAMES = re.compile(r"\.(layer_norm|fc1|fc2)_(weight|bias)$")  # with an underscore where others have a dot
ENGINE_SIZES = ("n_layers", "d_model", "n_heads")
SETTINGS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "layer_norm_eps": LAYER_NORM_EPS,
}


def open_folder(path: Path) -> tuple[EsmcArchitecture, Tensors]:
    """Open a Hugging Face folder; returns and raises as `seqmill.model.weights.open_weights`."""
    sizes = ENGINE_SIZES if "d_model" in read_json(path / CONFIG) else SIZES
    architecture = read_architecture(path / CONFIG, EsmcArchitecture, _own_fields, SETTINGS, "ESM C", sizes)
    state = load_safetensors(weight_files(path))
    naming = FIRST_RELEASES if any("transformer.blocks." in name for name in state) else HUGGING_FACE
    if any(ENGINE_NAMES.search(name) for name in state):
        naming = TRANSFORMER_ENGINE
        state = {ENGINE_NAMES.sub(r".\1.\2", name): tensor for name, tensor in state.items()}
    return architecture, naming.match(state, parameter_shapes(architecture), path, "ESM C")


def _own_fields(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    is_ours = isinstance(rope, dict) and rope.get("rope_type", "default") == "default"
    if not is_ours or rope.get("rope_theta", ROPE_BASE) != ROPE_BASE:
        raise ValueError(f"rope_parameters are {rope}; ESM C rotates with a base of {ROPE_BASE:g}")
    return {"vocabulary": config["vocab_size"]}


def open_checkpoint(path: Path) -> tuple[EsmcArchitecture, Tensors]:
    """Open a .pth file; its shape follows from its tensors. Returns and raises as `open_folder`."""
    what = "a checkpoint of ESM C"
    state = load_pickled(path, what)
    require_tensors(state, path, what)
    layers = {name.split(".blocks.")[1].split(".")[0] for name in state if ".blocks." in name}
    try:
        vocabulary, dim = next(tensor for name, tensor in state.items() if name.endswith("embed.weight")).shape
    except (StopIteration, ValueError) as error:
        raise SeqmillError(f"{path}: not {what}: it has no table of tokens") from error
    if not dim or dim % HEAD_DIM:
        raise SeqmillError(f"{path}: not {what}: hidden_dim is {dim}, not a multiple of {HEAD_DIM}")
    try:
        architecture = EsmcArchitecture(len(layers), dim, dim // HEAD_DIM, vocabulary)
    except ValueError as error:
        raise SeqmillError(f"{path}: not {what}: {error}") from error
    return architecture, FIRST_RELEASES.match(state, parameter_shapes(architecture), path, "ESM C")
