"""ESM-2's weights from a fair-esm checkpoint or a Hugging Face folder of safetensors."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from seqmill.errors import SeqmillError
from seqmill.model.esm2 import LAYER_NORM_EPS, parameter_shapes
from seqmill.model.tensor_files import (
    load_pickled,
    load_safetensors,
    match_tensors,
    read_architecture,
    require_tensors,
)
from seqmill.spec.models import CONFIG, Architecture, weight_files


@dataclass(frozen=True)
class Naming:
    """The names that a file format gives to the canonical parameters, without .weight and .bias."""

    prefix: str  # regular expression, stripped from the beginning of every key
    embed: str
    final_norm: str
    layer: str
    parts: Mapping[str, tuple[str, ...]]  # tensors under several names are concatenated by rows
    ignored: str  # regular expression for keys that the encoder does not use

    def names_of(self, parameter: str) -> list[str]:
        """Return the file's names for a canonical parameter (`esm2.parameter_shapes`)."""
        stem, kind = parameter.rsplit(".", 1)
        if found := re.fullmatch(r"layers\.(\d+)\.(\w+)", stem):
            return [f"{self.layer.format(found[1])}{part}.{kind}" for part in self.parts[found[2]]]
        return [f"{self.embed if stem == 'embed' else self.final_norm}.{kind}"]


FAIR_ESM = Naming(
    prefix=r"^encoder\.(sentence_encoder\.)?",
    embed="embed_tokens",
    final_norm="emb_layer_norm_after",
    layer="layers.{}.",
    parts={
        "attention_norm": ("self_attn_layer_norm",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": ("self_attn.out_proj",),
        "ffn_norm": ("final_layer_norm",),
        "fc1": ("fc1",),
        "fc2": ("fc2",),
    },
    ignored=r"^(lm_head|contact_head)\.|\.rot_emb\.inv_freq$",
)

HUGGING_FACE = Naming(
    prefix=r"^esm\.",
    embed="embeddings.word_embeddings",
    final_norm="encoder.emb_layer_norm_after",
    layer="encoder.layer.{}.",
    parts={
        "attention_norm": ("attention.LayerNorm",),
        "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "out": ("attention.output.dense",),
        "ffn_norm": ("LayerNorm",),
        "fc1": ("intermediate.dense",),
        "fc2": ("output.dense",),
    },
    ignored=r"^(lm_head|contact_head|pooler)\.|^embeddings\.position_(ids|embeddings\.weight)$|rotary_embeddings\.inv_freq$",
)
# Hugging Face's configuration has settings for other models of the family.
HUGGING_FACE_SETTINGS = {
    "position_embedding_type": "rotary",
    "emb_layer_norm_before": False,
    "hidden_act": "gelu",
    "layer_norm_eps": LAYER_NORM_EPS,
}


def open_checkpoint(path: Path) -> tuple[Architecture, dict[str, list[torch.Tensor]]]:
    """Open a fair-esm .pt file; returns and raises as `seqmill.model.weights.open_weights`."""
    try:
        content = load_pickled(path, "a fair-esm checkpoint", [argparse.Namespace])
        cfg = content["cfg"]["model"]
        architecture = Architecture(
            num_layers=cfg.encoder_layers,
            hidden_dim=cfg.encoder_embed_dim,
            num_heads=cfg.encoder_attention_heads,
            token_dropout=bool(cfg.token_dropout),
        )
        state = content["model"]
    except (KeyError, TypeError, AttributeError) as error:
        raise SeqmillError(
            f"{path}: not a fair-esm ESM-2 checkpoint: it has no cfg.model with its shape ({error})"
        ) from error
    except ValueError as error:
        raise SeqmillError(f"{path}: cannot be loaded as a fair-esm checkpoint: {error}") from error
    require_tensors(state, path, "a fair-esm checkpoint")
    return architecture, _match(state, architecture, FAIR_ESM, path)


def open_folder(path: Path) -> tuple[Architecture, dict[str, list[torch.Tensor]]]:
    """Open a Hugging Face folder; returns and raises as `seqmill.model.weights.open_weights`."""
    architecture = read_architecture(
        path / CONFIG,
        lambda config: Architecture(
            num_layers=config["num_hidden_layers"],
            hidden_dim=config["hidden_size"],
            num_heads=config["num_attention_heads"],
            token_dropout=bool(config.get("token_dropout", False)),
        ),
        HUGGING_FACE_SETTINGS,
        "ESM-2",
    )
    return architecture, _match(load_safetensors(weight_files(path)), architecture, HUGGING_FACE, path)


def save_checkpoint(architecture: Architecture, parts: Mapping[str, list[torch.Tensor]], path: Path) -> None:
    """Write the tensors of `seqmill.model.weights.open_weights` as a fair-esm checkpoint."""
    state = {}
    for parameter, tensors in parts.items():
        for name, tensor in zip(FAIR_ESM.names_of(parameter), tensors, strict=True):
            state[f"encoder.sentence_encoder.{name}"] = tensor
    shape = argparse.Namespace(
        encoder_layers=architecture.num_layers,
        encoder_embed_dim=architecture.hidden_dim,
        encoder_attention_heads=architecture.num_heads,
        token_dropout=architecture.token_dropout,
    )
    torch.save({"cfg": {"model": shape}, "model": state}, path)


def _match(
    state: Mapping[str, torch.Tensor], architecture: Architecture, naming: Naming, path: Path
) -> dict[str, list[torch.Tensor]]:
    state = {re.sub(naming.prefix, "", key): tensor for key, tensor in state.items()}
    shapes = parameter_shapes(architecture)
    return match_tensors(state, {name: naming.names_of(name) for name in shapes}, shapes, naming.ignored, path, "ESM-2")
