"""DNABERT-S's weights from a Hugging Face folder: safetensors, or the pickle in which it is published.

The names are those of the published code (MAGICS-LAB/DNABERT_S, `evaluate/model_codes/bert_layers.py`). Attention
biases are not stored.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from seqmill.errors import SeqmillError
from seqmill.model.dnabert_s import LAYER_NORM_EPS, parameter_shapes
from seqmill.model.tensor_files import (
    load_pickled,
    load_safetensors,
    match_tensors,
    read_architecture,
    require_tensors,
)
from seqmill.spec.models import CONFIG, PICKLED_WEIGHTS, DnabertArchitecture, weight_files

# The file's names for the canonical parameters, without .weight and .bias: of a layer, and of the model.
LAYER_PARTS = {
    "qkv": "attention.self.Wqkv",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "gated": "mlp.gated_layers",
    "down": "mlp.wo",
    "ffn_norm": "mlp.layernorm",
}
PARTS = {
    "embed": "embeddings.word_embeddings",
    "token_type": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
}
PREFIX = "bert."  # present if the file has a head on top of the encoder
IGNORED = r"^(pooler|cls)\.|^embeddings\.(position|token_type)_ids$"


def open_folder(path: Path) -> tuple[DnabertArchitecture, dict[str, list[torch.Tensor]]]:
    """Open a Hugging Face folder; returns and raises as `seqmill.model.weights.open_weights`."""
    architecture = read_architecture(
        path / CONFIG,
        lambda config: DnabertArchitecture(
            num_layers=config["num_hidden_layers"],
            hidden_dim=config["hidden_size"],
            num_heads=config["num_attention_heads"],
            vocabulary=config["vocab_size"],
            token_types=config["type_vocab_size"],
        ),
        {"layer_norm_eps": LAYER_NORM_EPS},
        "DNABERT-S",
    )
    files = weight_files(path)
    if not files:
        raise SeqmillError(f"{path}: the folder has neither a .safetensors file nor {PICKLED_WEIGHTS}")
    if files[0].name == PICKLED_WEIGHTS:
        file = files[0]
        state = load_pickled(file, "weights of DNABERT-S")
        require_tensors(state, file, "weights of DNABERT-S")
    else:
        state, file = load_safetensors(files), path
    stripped = {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}
    if len(stripped) < len(state):
        raise SeqmillError(f"{file}: holds tensors both with the prefix {PREFIX} and without it")
    shapes = parameter_shapes(architecture)
    sources = {name: [_file_name(name)] for name in shapes}
    return architecture, match_tensors(stripped, sources, shapes, IGNORED, file, "DNABERT-S")


def _file_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if found := re.fullmatch(r"layers\.(\d+)\.(\w+)", stem):
        return f"encoder.layer.{found[1]}.{LAYER_PARTS[found[2]]}.{kind}"
    return f"{PARTS[stem]}.{kind}"
