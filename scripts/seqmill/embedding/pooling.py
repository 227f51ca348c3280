"""Pooling: from token vectors to one vector per segment, and from segments to one vector per sequence.

| family | name | vector |
|---|---|---|
| proteins | mean, mean_tokens | mean over the residues, without special tokens, as the authors compute it |
| DNABERT-S | mean | mean over all tokens, CLS and SEP included, as its authors compute it |
| DNABERT-S | mean_tokens | mean over the tokens of the sequence, without CLS and SEP |
| all | max, std | maximum and standard deviation of each channel, without special tokens |
| all but T5 | cls | the vector of the first token |
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from seqmill.model.kernels import fused, pool_triton
from seqmill.model.pack import Pack
from seqmill.spec.families import DNABERT_S, Family


def mean_over_residues(hidden: torch.Tensor, pack: Pack, before: int = 1, after: int = 1) -> torch.Tensor:
    """Average each segment's hidden states over its residues.

    Args:
        hidden: (num_tokens, hidden_dim), float32 or float64.
        pack: the segments; each has at least one residue.
        before, after: special tokens at the ends of each segment.

    Returns:
        (num_segments, hidden_dim), in the dtype of `hidden`.
    """
    if _has_kernels(hidden):
        return pool_triton.mean(hidden, pack.cu_seqlens, before, after)
    if hidden.is_cuda:
        return _by_segments(hidden, pack, before, after)
    return torch.cat([inner.mean(dim=1) for inner in _inner(hidden, pack, before, after)])


def mean_over_tokens(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Average each segment's hidden states over all its tokens; shapes as `mean_over_residues`."""
    if _has_kernels(hidden):
        return pool_triton.mean(hidden, pack.cu_seqlens, before=0, after=0)
    if hidden.is_cuda:
        # unsafe: the check that the lengths add up would wait for the device.
        return torch.segment_reduce(hidden, "mean", lengths=pack.cu_seqlens.diff().long(), axis=0, unsafe=True)
    return torch.cat([tokens.mean(dim=1) for tokens in _runs(hidden, pack)])


def first_token(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Return the hidden state of each segment's first token; shapes as `mean_over_residues`."""
    return hidden[pack.cu_seqlens[:-1].long()]


def max_over_residues(hidden: torch.Tensor, pack: Pack, before: int = 1, after: int = 1) -> torch.Tensor:
    """Return each channel's maximum over the residues; arguments and shapes as `mean_over_residues`."""
    if _has_kernels(hidden):
        return pool_triton.largest(hidden, pack.cu_seqlens, before, after)
    if hidden.is_cuda:
        return torch.segment_reduce(hidden, "max", lengths=_thirds(pack, before, after), axis=0, unsafe=True)[1::3]
    return torch.cat([inner.amax(dim=1) for inner in _inner(hidden, pack, before, after)])


def mean_and_variance(hidden: torch.Tensor, pack: Pack, before: int = 1, after: int = 1) -> torch.Tensor:
    """Return mean and population variance over the residues: (num_segments, 2 * hidden_dim).

    The arguments are those of `mean_over_residues`.
    """
    if _has_kernels(hidden):
        return pool_triton.mean_and_variance(hidden, pack.cu_seqlens, before, after)
    if hidden.is_cuda:
        means = _by_segments(hidden, pack, before, after)
        lengths = pack.cu_seqlens.diff().long()
        spread = torch.repeat_interleave(means, lengths, dim=0, output_size=len(hidden))
        return torch.cat((means, _by_segments((hidden - spread).square(), pack, before, after)), dim=1)
    pooled = []
    for inner in _inner(hidden, pack, before, after):
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


def poolings_of(family: Family) -> dict[str, Pooling]:
    """Return a family's poolings by name."""
    of_residues, deviations, maxima = (
        partial(pool, before=family.before, after=family.after)
        for pool in (mean_over_residues, mean_and_variance, max_over_residues)
    )
    mean = mean_over_tokens if family == DNABERT_S else of_residues
    found = {
        "mean": Pooling(mean),
        "mean_tokens": Pooling(of_residues),
        "max": Pooling(maxima, combine_maxima),
        "std": Pooling(deviations, combine_deviations, 2),
    }
    return {**found, "cls": Pooling(first_token)} if family.has_cls else found


def _has_kernels(hidden: torch.Tensor) -> bool:
    """Return whether our kernels pool these hidden states; on CUDA without them, one thread sums up a channel."""
    # The device without its number, as when the model was made: the answer is known, so nothing waits for the device.
    kind = torch.device(hidden.device.type)
    return hidden.is_cuda and hidden.dtype == torch.float32 and fused.available(kind)


def _runs(hidden: torch.Tensor, pack: Pack) -> Iterator[torch.Tensor]:
    """Yield the tokens of each run of segments of equal length: (segments, tokens, hidden_dim)."""
    for start, count, length in pack.runs:
        yield hidden[start : start + count * length].view(count, length, -1)


def _inner(hidden: torch.Tensor, pack: Pack, before: int, after: int) -> Iterator[torch.Tensor]:
    """Yield the same without the special tokens of each segment."""
    return (tokens[:, before : tokens.shape[1] - after] for tokens in _runs(hidden, pack))


def _thirds(pack: Pack, before: int, after: int) -> torch.Tensor:
    """Return the lengths of three spans of each segment: the special tokens before, the residues, those after."""
    residues = pack.cu_seqlens.diff().long() - before - after
    ends = torch.ones_like(residues)
    return torch.stack((before * ends, residues, after * ends), dim=1).flatten()


def _by_segments(hidden: torch.Tensor, pack: Pack, before: int, after: int) -> torch.Tensor:
    """Return the means over residues by one segment reduction."""
    # unsafe: the check that the lengths add up would wait for the device.
    lengths = _thirds(pack, before, after)
    return torch.segment_reduce(hidden, "mean", lengths=lengths, axis=0, unsafe=True)[1::3]
