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
    if hidden.is_cuda:
        return _by_segments(hidden, pack)
    means = [
        hidden[start : start + count * length].view(count, length, -1)[:, 1:-1].mean(dim=1)
        for start, count, length in pack.runs
    ]
    return torch.cat(means)


def mean_over_tokens(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Average each sequence's hidden states over all its tokens, CLS and SEP included, as DNABERT-S's authors do.

    Args:
        hidden: (num_tokens, hidden_dim), float32 or float64.
        pack: where the sequences begin.

    Returns:
        (num_sequences, hidden_dim), in the dtype of `hidden`.
    """
    if hidden.is_cuda:
        # unsafe: the segments are not checked to add up, which would wait for the device.
        return torch.segment_reduce(hidden, "mean", lengths=pack.cu_seqlens.diff().long(), axis=0, unsafe=True)
    return torch.cat(
        [
            hidden[start : start + count * length].view(count, length, -1).mean(dim=1)
            for start, count, length in pack.runs
        ]
    )


def _by_segments(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
    """The same by one segment reduction: each sequence is three segments, cls, residues and eos."""
    residues = pack.cu_seqlens.diff().long() - 2
    ends = torch.ones_like(residues)
    segments = torch.stack((ends, residues, ends), dim=1).flatten()
    # unsafe: the segments are not checked to add up, which would wait for the device.
    return torch.segment_reduce(hidden, "mean", lengths=segments, axis=0, unsafe=True)[1::3]
