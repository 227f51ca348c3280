"""The reference: fair-esm 2.0.0 on seeded weights, one unpadded sequence at a time."""

from __future__ import annotations

import argparse
from pathlib import Path

import esm
import numpy as np
import torch

from seqpack.models.registry import Architecture

ALPHABET = esm.data.Alphabet.from_architecture("ESM-1b")


def fair_esm_model(architecture: Architecture, seed: int = 7) -> esm.ESM2:
    """Return a fair-esm model with seeded weights, none of them at a trivial value (no zero bias, no unit norm)."""
    torch.manual_seed(seed)
    model = esm.ESM2(
        num_layers=architecture.num_layers,
        embed_dim=architecture.hidden_dim,
        attention_heads=architecture.num_heads,
        alphabet=ALPHABET,
        token_dropout=architecture.token_dropout,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif "embed_tokens" not in name:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.eval()


def save_checkpoint(model: esm.ESM2, path: Path) -> Path:
    """Save a model as fair-esm's released .pt files are: prefixed keys, the shape in a Namespace."""
    state = {}
    for name, tensor in model.state_dict().items():
        prefix = "encoder." if name.startswith(("lm_head", "contact_head")) else "encoder.sentence_encoder."
        state[prefix + name] = tensor
    namespace = argparse.Namespace(
        encoder_layers=model.num_layers,
        encoder_embed_dim=model.embed_dim,
        encoder_attention_heads=model.attention_heads,
        token_dropout=model.token_dropout,
    )
    torch.save({"cfg": {"model": namespace}, "model": state}, path)
    return path


@torch.no_grad()
def fair_esm_hidden(model: esm.ESM2, sequence: str) -> np.ndarray:
    """Return the last layer's hidden states, cls and eos included: (length + 2, hidden_dim)."""
    tokens = torch.tensor([[ALPHABET.cls_idx, *ALPHABET.encode(sequence), ALPHABET.eos_idx]])
    result = model(tokens, repr_layers=[model.num_layers])
    return result["representations"][model.num_layers][0].numpy()
