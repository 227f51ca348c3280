"""Pooling: from one vector a token to one vector a segment, and from segments to one vector a sequence.

By name, for each family of models (`seqpack.task.POOLINGS`):

| family | name | what |
|---|---|---|
| ESM-2 | mean | the mean over the residues, neither cls nor eos, as fair-esm does |
| DNABERT-S | mean | the mean over all tokens, CLS and SEP included, as the authors do |
| DNABERT-S | mean_tokens | the mean over the tokens of the sequence alone |
| both | cls | the vector of the first token |
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from seqpack.models.registry import DNABERT_S, ESM2
from seqpack.packs import Pack

Pooling = Callable[[torch.Tensor, Pack], torch.Tensor]


def mean_over_residues(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Average each segment's hidden states over all tokens but its first and last.

    Args:
        hidden: (num_tokens, hidden_dim), float32 or float64.
        pack: where the segments begin; each has at least three tokens.

    Returns:
        (num_segments, hidden_dim), in the dtype of `hidden`.
    """
    if hidden.is_cuda:
        return _by_segments(hidden, pack)
    means = [
        hidden[start : start + count * length].view(count, length, -1)[:, 1:-1].mean(dim=1)
        for start, count, length in pack.runs
    ]
    return torch.cat(means)


def mean_over_tokens(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Average each segment's hidden states over all its tokens; shapes as `mean_over_residues`."""
    if hidden.is_cuda:
        # unsafe: the segments are not checked to add up, which would wait for the device.
        return torch.segment_reduce(hidden, "mean", lengths=pack.cu_seqlens.diff().long(), axis=0, unsafe=True)
    return torch.cat(
        [
            hidden[start : start + count * length].view(count, length, -1).mean(dim=1)
            for start, count, length in pack.runs
        ]
    )


def first_token(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Return the hidden state of each segment's first token; shapes as `mean_over_residues`."""
    return hidden[pack.cu_seqlens[:-1].long()]


BY_NAME: dict[str, dict[str, Pooling]] = {
    ESM2: {"mean": mean_over_residues, "cls": first_token},
    DNABERT_S: {"mean": mean_over_tokens, "mean_tokens": mean_over_residues, "cls": first_token},
}


def combine_segments(vectors: np.ndarray, begins: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average the vectors of each sequence's segments, weighted by the residues or bases in them.

    A sequence of one segment keeps its vector's bits.

    Args:
        vectors: float32 (num_segments, hidden_dim).
        begins: int64 (num_sequences,), where each sequence's segments begin.
        weights: int32 (num_segments,).

    Returns:
        float32 (num_sequences, hidden_dim).
    """
    weights = weights.astype(np.float64)[:, None]
    return (np.add.reduceat(vectors * weights, begins) / np.add.reduceat(weights, begins)).astype(np.float32)


def _by_segments(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
    """The mean over residues by one segment reduction: first token, the others and last token of each."""
    residues = pack.cu_seqlens.diff().long() - 2
    ends = torch.ones_like(residues)
    segments = torch.stack((ends, residues, ends), dim=1).flatten()
    # unsafe: the segments are not checked to add up, which would wait for the device.
    return torch.segment_reduce(hidden, "mean", lengths=segments, axis=0, unsafe=True)[1::3]
