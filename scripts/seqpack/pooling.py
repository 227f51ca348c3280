"""Pooling: from one vector a token to one vector a sequence."""

from __future__ import annotations

import torch

from seqpack.packs import Pack

MEAN_OVER_RESIDUES = "mean"


def mean_over_residues(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Average each sequence's hidden states over its residues, neither cls nor eos, as fair-esm does.

    Args:
        hidden: (num_tokens, hidden_dim), float32 or float64.
        pack: where the sequences begin; each has at least one residue.

    Returns:
        (num_sequences, hidden_dim), in the dtype of `hidden`.
    """
    means = [
        hidden[start : start + count * length].view(count, length, -1)[:, 1:-1].mean(dim=1)
        for start, count, length in pack.runs
    ]
    return torch.cat(means)
