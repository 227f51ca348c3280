"""Weights of a model from a fair-esm checkpoint, a Hugging Face folder, or a seed.

All three give the same canonical tensors (`parameter_shapes` of the model's module) and a digest of their values,
so that a model is recognized whatever file it came from. Nothing in a file is executed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from seqmill.errors import SeqmillError
from seqmill.model import dnabert_s, esm2
from seqmill.model.dnabert_weights import open_dnabert_folder
from seqmill.model.tensor_files import load_pickled, load_safetensors, match_tensors, require_tensors
from seqmill.model.weights_record import require_recorded
from seqmill.spec.models import (
    CONFIG,
    DNABERT_S,
    AnyArchitecture,
    Architecture,
    DnabertArchitecture,
    ModelSource,
    read_json,
    weight_files,
)

UNTRAINED_SEED = 20230316


@dataclass(frozen=True)
class Weights:
    """A model's tensors.

    Attributes:
        architecture: the model's shape.
        tensors: by canonical name, in the dtype of the file.
        digest: SHA-256 (hexadecimal) of the values as float32, with their names and the architecture.
        trained: False for seeded random weights, whose embeddings mean nothing.
    """

    architecture: AnyArchitecture
    tensors: dict[str, torch.Tensor]
    digest: str
    trained: bool


@dataclass(frozen=True)
class Naming:
    """How a file format names the canonical parameters (without .weight and .bias)."""

    prefix: str  # regular expression, stripped from the beginning of every key
    embed: str
    final_norm: str
    layer: str
    parts: Mapping[str, tuple[str, ...]]  # several names are concatenated by rows
    ignored: str  # regular expression of keys that the encoder does not use


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


def load_weights(source: ModelSource) -> Weights:
    """Load a model's weights.

    Raises:
        SeqmillError: the file is absent, damaged, not of the model's family, or lacks or has unknown tensors; those of
            a released model are not the ones that were fetched (`seqmill.model.weights_record`).
    """
    if source.kind == "untrained":
        assert source.architecture is not None
        architecture, tensors = source.architecture, untrained_tensors(source.architecture)
    else:
        architecture, parts = open_weights(source)
        tensors = {name: torch.cat(part) if len(part) > 1 else part[0] for name, part in parts.items()}
    digest = _digest(architecture, tensors)
    require_recorded(source, digest)
    return Weights(architecture, tensors, digest, trained=source.kind != "untrained")


def open_weights(source: ModelSource) -> tuple[AnyArchitecture, dict[str, list[torch.Tensor]]]:
    """Open a weights file as memory maps and check that it holds the tensors it should, without reading them.

    Returns:
        The architecture, and by canonical name the file's tensors, which are to be joined by rows.

    Raises:
        SeqmillError: as `load_weights`.
    """
    assert source.path is not None
    if source.family == DNABERT_S:
        architecture, parts = open_dnabert_folder(source.path)
    else:
        architecture, parts = (_open_folder if source.kind == "folder" else _open_checkpoint)(source.path)
    if source.architecture is not None and architecture != source.architecture:
        raise SeqmillError(f"{source.path}: holds {architecture}, but {source.name} is {source.architecture}")
    return architecture, parts


def parameter_shapes(architecture: AnyArchitecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a model of either family by its canonical name."""
    if isinstance(architecture, DnabertArchitecture):
        return dnabert_s.parameter_shapes(architecture)
    return esm2.parameter_shapes(architecture)


def untrained_tensors(architecture: AnyArchitecture) -> dict[str, torch.Tensor]:
    """Return seeded random weights, the same bits on every machine.

    Uniform values scaled so that activations and attention scores have a spread of about one. Every
    tensor has a generator of its own, so that the values of a layer do not depend on the others.
    """
    tensors = {}
    for name, shape in parameter_shapes(architecture).items():
        generator = np.random.Generator(np.random.PCG64([UNTRAINED_SEED, zlib.crc32(name.encode())]))
        values = generator.random(shape, dtype=np.float32) * 2 - 1
        if len(shape) == 2:
            fan_in = 1 if name.startswith("embed.") else shape[1]
            values *= np.float32(math.sqrt(3 / fan_in))
        else:
            values *= np.float32(0.1)
            if "norm" in name and name.endswith(".weight"):
                values += 1
        tensors[name] = torch.from_numpy(values)
    return tensors


def _open_checkpoint(path: Path) -> tuple[Architecture, dict[str, list[torch.Tensor]]]:
    if not path.is_file():
        raise SeqmillError(
            f"{path}: no such weights; fetch them with `snakemake fetch_models` or scripts/fetch_weights.py"
        )
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
    return architecture, canonical_parts(state, architecture, FAIR_ESM, path)


def save_checkpoint(architecture: Architecture, parts: Mapping[str, list[torch.Tensor]], path: Path) -> None:
    """Write the tensors of `open_weights` as a fair-esm checkpoint; those that are joined go back to one a name."""
    state = {}
    for canonical, tensors in parts.items():
        stem, _, kind = canonical.rpartition(".")
        if stem.startswith("layers."):
            _, layer, part = stem.split(".")
            names = [FAIR_ESM.layer.format(layer) + name for name in FAIR_ESM.parts[part]]
        else:
            names = [{"embed": FAIR_ESM.embed, "final_norm": FAIR_ESM.final_norm}[stem]]
        for name, tensor in zip(names, tensors, strict=True):
            state[f"encoder.sentence_encoder.{name}.{kind}"] = tensor
    shape = argparse.Namespace(
        encoder_layers=architecture.num_layers,
        encoder_embed_dim=architecture.hidden_dim,
        encoder_attention_heads=architecture.num_heads,
        token_dropout=architecture.token_dropout,
    )
    torch.save({"cfg": {"model": shape}, "model": state}, path)


def _open_folder(path: Path) -> tuple[Architecture, dict[str, list[torch.Tensor]]]:
    config_path = path / CONFIG
    config = read_json(config_path)
    for key, value in {
        "position_embedding_type": "rotary",
        "emb_layer_norm_before": False,
        "hidden_act": "gelu",
        "layer_norm_eps": esm2.LAYER_NORM_EPS,
    }.items():
        if config.get(key, value) not in (value, None):
            raise SeqmillError(f"{config_path}: {key} is {config[key]!r}; ESM-2 has {value!r}")
    try:
        architecture = Architecture(
            num_layers=config["num_hidden_layers"],
            hidden_dim=config["hidden_size"],
            num_heads=config["num_attention_heads"],
            token_dropout=bool(config.get("token_dropout", False)),
        )
    except KeyError as error:
        raise SeqmillError(f"{config_path}: lacks {error}") from error
    except ValueError as error:
        raise SeqmillError(f"{config_path}: not the shape of a model: {error}") from error
    if config.get("intermediate_size", architecture.ffn_dim) != architecture.ffn_dim:
        raise SeqmillError(f"{config_path}: intermediate_size is not 4 x hidden_size, as in ESM-2")

    return architecture, canonical_parts(load_safetensors(weight_files(path)), architecture, HUGGING_FACE, path)


def canonical_parts(
    state: Mapping[str, torch.Tensor], architecture: Architecture, naming: Naming, path: Path
) -> dict[str, list[torch.Tensor]]:
    """Sort a file's tensors by canonical name; several under one name are to be joined by rows.

    Raises:
        SeqmillError: lists missing and unknown keys, and tensors of a wrong shape.
    """
    state = {re.sub(naming.prefix, "", key): tensor for key, tensor in state.items()}
    sources = {"embed.weight": [f"{naming.embed}.weight"]}
    for kind in ("weight", "bias"):
        sources[f"final_norm.{kind}"] = [f"{naming.final_norm}.{kind}"]
        for layer in range(architecture.num_layers):
            for part, names in naming.parts.items():
                prefix = naming.layer.format(layer)
                sources[f"layers.{layer}.{part}.{kind}"] = [f"{prefix}{name}.{kind}" for name in names]
    return match_tensors(state, sources, esm2.parameter_shapes(architecture), naming.ignored, path, "ESM-2")


def _digest(architecture: AnyArchitecture, tensors: Mapping[str, torch.Tensor]) -> str:
    def digest_one(name: str) -> bytes:
        values = tensors[name].to(torch.float32).contiguous().numpy()
        return hashlib.sha256(f"{name}{values.shape}".encode() + hashlib.sha256(values).digest()).digest()

    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter's lock
        digests = list(pool.map(digest_one, sorted(tensors)))
    return hashlib.sha256(json.dumps(asdict(architecture)).encode() + b"".join(digests)).hexdigest()
