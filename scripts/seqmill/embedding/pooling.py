"""Pooling: from token vectors to one vector per segment, and from segments to one vector per sequence.

| family | name | vector |
|---|---|---|
| ESM-2 | mean, mean_tokens | mean over the residues, without cls and eos, as in fair-esm |
| DNABERT-S | mean | mean over all tokens, CLS and SEP included, as its authors compute it |
| DNABERT-S | mean_tokens | mean over the tokens of the sequence, without CLS and SEP |
| both | max, std | maximum and standard deviation of each channel, without special tokens |
| both | cls | the vector of the first token |
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from seqmill.model.kernels import fused, pool_triton
from seqmill.model.pack import Pack
from seqmill.spec.models import DNABERT_S, ESM2


def mean_over_residues(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Average each segment's hidden states over all tokens but its first and last.

    Args:
        hidden: (num_tokens, hidden_dim), float32 or float64.
        pack: the segments; each has at least three tokens.

    Returns:
        (num_segments, hidden_dim), in the dtype of `hidden`.
    """
    if _has_kernels(hidden):
        return pool_triton.mean(hidden, pack.cu_seqlens, ends=1)
    if hidden.is_cuda:
        return _by_segments(hidden, pack)
    return torch.cat([inner.mean(dim=1) for inner in _inner(hidden, pack)])


def mean_over_tokens(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Average each segment's hidden states over all its tokens; shapes as `mean_over_residues`."""
    if _has_kernels(hidden):
        return pool_triton.mean(hidden, pack.cu_seqlens, ends=0)
    if hidden.is_cuda:
        # unsafe: the check that the lengths add up would wait for the device.
        return torch.segment_reduce(hidden, "mean", lengths=pack.cu_seqlens.diff().long(), axis=0, unsafe=True)
    return torch.cat([tokens.mean(dim=1) for tokens in _runs(hidden, pack)])


def first_token(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Return the hidden state of each segment's first token; shapes as `mean_over_residues`."""
    return hidden[pack.cu_seqlens[:-1].long()]


def max_over_residues(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Return each channel's maximum over all tokens but the first and last; shapes as `mean_over_residues`."""
    if _has_kernels(hidden):
        return pool_triton.largest(hidden, pack.cu_seqlens, ends=1)
    if hidden.is_cuda:
        return torch.segment_reduce(hidden, "max", lengths=_thirds(pack), axis=0, unsafe=True)[1::3]
    return torch.cat([inner.amax(dim=1) for inner in _inner(hidden, pack)])


def mean_and_variance(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Return mean and population variance over all tokens but the first and last: (num_segments, 2 * hidden_dim)."""
    if _has_kernels(hidden):
        return pool_triton.mean_and_variance(hidden, pack.cu_seqlens, ends=1)
    if hidden.is_cuda:
        means = _by_segments(hidden, pack)
        lengths = pack.cu_seqlens.diff().long()
        spread = torch.repeat_interleave(means, lengths, dim=0, output_size=len(hidden))
        return torch.cat((means, _by_segments((hidden - spread).square(), pack)), dim=1)
    pooled = []
    for inner in _inner(hidden, pack):
        means = inner.mean(dim=1)
        pooled.append(torch.cat((means, (inner - means[:, None]).square().mean(dim=1)), dim=1))
    return torch.cat(pooled)


def combine_means(vectors: np.ndarray, begins: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average the vectors of each sequence's segments, weighted by their residues or bases.

    The vector of a sequence of one segment keeps its bits.

    Args:
        vectors: float32 (num_segments, hidden_dim).
        begins: int64 (num_sequences,), each sequence's first segment.
        weights: int32 (num_segments,).

    Returns:
        float32 (num_sequences, hidden_dim).
    """
    weights = weights.astype(np.float64)[:, None]
    return (np.add.reduceat(vectors * weights, begins) / np.add.reduceat(weights, begins)).astype(np.float32)


def combine_maxima(vectors: np.ndarray, begins: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return each channel's maximum over a sequence's segments; arguments as `combine_means`."""
    return np.maximum.reduceat(vectors, begins)


def combine_deviations(vectors: np.ndarray, begins: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the standard deviation over a sequence's segments.

    `vectors` are those of `mean_and_variance`, float32 (num_segments, 2 * hidden_dim); the others as `combine_means`.
    """
    means, variances = np.split(vectors.astype(np.float64), 2, axis=1)
    shares = weights.astype(np.float64)[:, None]
    totals = np.add.reduceat(shares, begins)
    counts = np.diff(np.append(begins, len(vectors)))
    center = np.repeat(np.add.reduceat(means * shares, begins) / totals, counts, axis=0)
    spread = np.add.reduceat((variances + (means - center) ** 2) * shares, begins) / totals
    return np.sqrt(spread).astype(np.float32)


@dataclass(frozen=True)
class Pooling:
    """How a sequence gets its vector."""

    of_segment: Callable[[torch.Tensor, Pack], torch.Tensor]  # from a pack's hidden states to a row per segment
    combine: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] = combine_means  # to a row per sequence
    width: int = 1  # of a segment's row, in hidden dimensions


SHARED = {
    "cls": Pooling(first_token),
    "max": Pooling(max_over_residues, combine_maxima),
    "std": Pooling(mean_and_variance, combine_deviations, 2),
}
BY_NAME: dict[str, dict[str, Pooling]] = {
    ESM2: {"mean": Pooling(mean_over_residues), "mean_tokens": Pooling(mean_over_residues), **SHARED},
    DNABERT_S: {"mean": Pooling(mean_over_tokens), "mean_tokens": Pooling(mean_over_residues), **SHARED},
}


def _has_kernels(hidden: torch.Tensor) -> bool:
    """Return whether our kernels pool these hidden states; on CUDA without them, one thread sums up a channel."""
    # The device without its number, as when the model was made: the answer is known, so nothing waits for the device.
    kind = torch.device(hidden.device.type)
    return hidden.is_cuda and hidden.dtype == torch.float32 and fused.available(kind)


def _runs(hidden: torch.Tensor, pack: Pack) -> Iterator[torch.Tensor]:
    """Yield the tokens of each run of segments of equal length: (segments, tokens, hidden_dim)."""
    for start, count, length in pack.runs:
        yield hidden[start : start + count * length].view(count, length, -1)


def _inner(hidden: torch.Tensor, pack: Pack) -> Iterator[torch.Tensor]:
    """Yield the same without the first and last token of each segment."""
    return (tokens[:, 1:-1] for tokens in _runs(hidden, pack))


def _thirds(pack: Pack) -> torch.Tensor:
    """Return the lengths of three spans of each segment: its first token, the others, its last token."""
    residues = pack.cu_seqlens.diff().long() - 2
    ends = torch.ones_like(residues)
    return torch.stack((ends, residues, ends), dim=1).flatten()


def _by_segments(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Return the means over residues by one segment reduction."""
    # unsafe: the check that the lengths add up would wait for the device.
    return torch.segment_reduce(hidden, "mean", lengths=_thirds(pack), axis=0, unsafe=True)[1::3]
