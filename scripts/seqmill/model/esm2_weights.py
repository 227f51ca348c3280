"""ESM-2's weights from a fair-esm checkpoint or a Hugging Face folder of safetensors."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from seqmill.errors import SeqmillError
from seqmill.model.esm2 import LAYER_NORM_EPS, parameter_shapes
from seqmill.model.tensor_files import (
    Naming,
    Tensors,
    load_pickled,
    load_safetensors,
    read_architecture,
    require_tensors,
)
from seqmill.spec.architectures import Esm2Architecture
from seqmill.spec.models import CONFIG
from seqmill.spec.weight_files import weight_files

FAIR_ESM = Naming(
    prefix=r"^encoder\.(sentence_encoder\.)?",
    whole={"embed": "embed_tokens", "final_norm": "emb_layer_norm_after"},
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
    whole={"embed": "embeddings.word_embeddings", "final_norm": "encoder.emb_layer_norm_after"},
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


def open_checkpoint(path: Path) -> tuple[Esm2Architecture, Tensors]:
    """Open a fair-esm .pt file; returns and raises as `seqmill.model.weights.open_weights`."""
    try:
        content = load_pickled(path, "a fair-esm checkpoint", [argparse.Namespace])
        cfg = content["cfg"]["model"]
        architecture = Esm2Architecture(
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
    return architecture, FAIR_ESM.match(state, parameter_shapes(architecture), path, "ESM-2")


def open_folder(path: Path) -> tuple[Esm2Architecture, Tensors]:
    """Open a Hugging Face folder; returns and raises as `seqmill.model.weights.open_weights`."""
    architecture = read_architecture(
        path / CONFIG,
        Esm2Architecture,
        lambda config: {"token_dropout": bool(config.get("token_dropout", False))},
        HUGGING_FACE_SETTINGS,
        "ESM-2",
    )
    state = load_safetensors(weight_files(path))
    return architecture, HUGGING_FACE.match(state, parameter_shapes(architecture), path, "ESM-2")


def save_checkpoint(architecture: Esm2Architecture, parts: Mapping[str, list[torch.Tensor]], path: Path) -> None:
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
