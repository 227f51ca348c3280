"""Weights of DNABERT-S from a Hugging Face folder: safetensors, or the pickle in which it is published.

The names are those of the published code (MAGICS-LAB/DNABERT_S, `evaluate/model_codes/bert_layers.py`). Its
biases of attention are not stored.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from seqmill.errors import SeqmillError
from seqmill.model.dnabert_s import LAYER_NORM_EPS, parameter_shapes
from seqmill.model.tensor_files import load_pickled, load_safetensors, match_tensors, require_tensors
from seqmill.spec.models import CONFIG, PICKLED_WEIGHTS, DnabertArchitecture, read_json, weight_files

# From canonical names (without .weight and .bias) to a layer's and the model's.
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
PREFIX = "bert."  # with a head around the encoder
IGNORED = r"^(pooler|cls)\.|^embeddings\.(position|token_type)_ids$"


def open_dnabert_folder(path: Path) -> tuple[DnabertArchitecture, dict[str, list[torch.Tensor]]]:
    """Open the weights as memory maps and check that they are the tensors they should, without reading them.

    Returns:
        The architecture, and by canonical name the tensor, in a list of its own.

    Raises:
        SeqmillError: a file is absent, damaged or not of DNABERT-S; lists missing and unknown keys.
    """
    if not path.is_dir():
        raise SeqmillError(
            f"{path}: no such weights; fetch them with `snakemake fetch_models` or scripts/fetch_weights.py, or put "
            "the folder of the model on Hugging Face there"
        )
    architecture = _read_config(path / CONFIG)
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


def _read_config(path: Path) -> DnabertArchitecture:
    config = read_json(path)
    try:
        architecture = DnabertArchitecture(
            num_layers=config["num_hidden_layers"],
            hidden_dim=config["hidden_size"],
            num_heads=config["num_attention_heads"],
            vocabulary=config["vocab_size"],
            token_types=config["type_vocab_size"],
        )
    except KeyError as error:
        raise SeqmillError(f"{path}: lacks {error}") from error
    except ValueError as error:
        raise SeqmillError(f"{path}: not the shape of a model: {error}") from error
    for key, value in {"layer_norm_eps": LAYER_NORM_EPS, "intermediate_size": architecture.ffn_dim}.items():
        if config.get(key, value) != value:
            raise SeqmillError(f"{path}: {key} is {config[key]!r}; DNABERT-S has {value!r}")
    return architecture
