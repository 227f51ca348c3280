"""Pooling of the hidden states of a pack on CUDA, written in Triton: one pass over them, in two stages of fixed shape.

The first stage reduces blocks of TOKENS tokens, counted from the start of each segment; the second combines the blocks
of a segment, always the same ones in the same order. Nothing depends on the other segments or on which block runs
first, so a segment has the same bits in any pack. Sums are float32, and short by construction: a value of a segment of
50,000 tokens passes at most 64 + 25 + 32 additions, and fewer on a GPU, which adds up each block as a tree.

All shapes are known on the host, so nothing waits for the device.
"""

from __future__ import annotations  # triton may be missing

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU build does not include it
    triton = None

TOKENS = 64  # in a block of the first stage
BLOCKS = 32  # that the second stage reads at once
COLUMNS = 64  # of a program in both stages: 256 bytes of each token
WARPS = 4


def mean(hidden: torch.Tensor, cu_seqlens: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """Average each segment's hidden states.

    Args:
        hidden: float32 (num_tokens, hidden_dim), contiguous.
        cu_seqlens: int32 (num_segments + 1,), where each segment begins, and the end.
        before, after: tokens to leave out at the ends of a segment; others must remain.

    Returns:
        float32 (num_segments, hidden_dim).
    """
    return _pool(hidden, cu_seqlens, before, after)


def largest(hidden: torch.Tensor, cu_seqlens: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """Return each channel's maximum, NaN if one of the values is; arguments and shape as for `mean`."""
    return _pool(hidden, cu_seqlens, before, after, maximum=True)


def mean_and_variance(hidden: torch.Tensor, cu_seqlens: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """Return mean and population variance: float32 (num_segments, 2 * hidden_dim); arguments as for `mean`.

    Squares are of differences from the mean of a block; its distance from the segment's mean is added (Chan et al.
    1983, doi:10.1080/00031305.1983.10483115). So a mean much larger than the spread costs no digits.
    """
    return _pool(hidden, cu_seqlens, before, after, variance=True)


def launch(dim: int, num_tokens: int, num_segments: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the grids of the two stages: (blocks of tokens, blocks of columns) and (segments, blocks of columns).

    Segment s has the blocks from cu_seqlens[s] // TOKENS + s on, which are enough for its tokens; some remain empty.
    """
    columns = -(-dim // COLUMNS)
    return (num_tokens // TOKENS + num_segments, columns), (num_segments, columns)


def _pool(
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor,
    before: int,
    after: int,
    maximum: bool = False,
    variance: bool = False,
) -> torch.Tensor:
    assert hidden.dtype == torch.float32
    assert hidden.is_contiguous()
    assert cu_seqlens.dtype == torch.int32
    (num_tokens, dim), num_segments = hidden.shape, len(cu_seqlens) - 1
    blocks, segments = launch(dim, num_tokens, num_segments)
    width = 2 * dim if variance else dim
    partial = torch.empty((blocks[0], width), dtype=torch.float32, device=hidden.device)
    pooled = torch.empty((num_segments, width), dtype=torch.float32, device=hidden.device)
    kind = (dim, before, after, maximum, variance, TOKENS)
    _reduce_blocks[blocks](hidden, cu_seqlens, partial, num_segments, *kind, COLUMNS, num_warps=WARPS)
    _combine_blocks[segments](partial, cu_seqlens, pooled, *kind, BLOCKS, COLUMNS, num_warps=WARPS)
    return pooled


def _jit(kernel: Callable[..., None]) -> Any:  # noqa: ANN401
    # Otherwise variants for one segment and for multiples of 16 would be compiled in the middle of a run.
    return triton.jit(kernel, do_not_specialize=["num_segments"]) if triton else kernel


@_jit
def _reduce_blocks(
    hidden_start: tl.tensor,
    cu_seqlens_start: tl.tensor,
    partial_start: tl.tensor,
    num_segments: int,
    dim: tl.constexpr,
    before: tl.constexpr,
    after: tl.constexpr,
    maximum: tl.constexpr,
    variance: tl.constexpr,
    tokens: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    segment, end = 0, num_segments  # bisection finds the segment of this block
    while end - segment > 1:
        middle = (segment + end) // 2
        if tl.load(cu_seqlens_start + middle) // tokens + middle <= program:
            segment = middle
        else:
            end = middle
    begin = tl.load(cu_seqlens_start + segment)
    length = tl.load(cu_seqlens_start + segment + 1) - begin - before - after
    first = (program - begin // tokens - segment) * tokens
    if first >= length:
        return
    token = first + tl.arange(0, tokens)[:, None]
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = (token < length) & (column < dim)[None, :]
    place = (begin + before + token).to(tl.int64) * dim + column[None, :]
    partial_place = partial_start + program.to(tl.int64) * (2 * dim if variance else dim) + column
    if maximum:
        x = tl.load(hidden_start + place, mask=inside, other=float("-inf"))
        # The sum is NaN if one of the values is, otherwise 0: tl.max passes over NaN.
        nan = tl.sum(tl.where(x != x, x, 0.0), 0)
        tl.store(partial_place, tl.max(tl.where(x != x, float("-inf"), x), 0) + nan, mask=column < dim)
    else:
        x = tl.load(hidden_start + place, mask=inside, other=0.0)
        total = tl.sum(x, 0)
        tl.store(partial_place, total, mask=column < dim)
        if variance:
            center = tl.div_rn(total, tl.minimum(length - first, tokens).to(tl.float32))
            centered = tl.where(inside, x - center[None, :], 0.0)
            tl.store(partial_place + dim, tl.sum(centered * centered, 0), mask=column < dim)


@_jit
def _combine_blocks(
    partial_start: tl.tensor,
    cu_seqlens_start: tl.tensor,
    pooled_start: tl.tensor,
    dim: tl.constexpr,
    before: tl.constexpr,
    after: tl.constexpr,
    maximum: tl.constexpr,
    variance: tl.constexpr,
    tokens: tl.constexpr,
    blocks: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    segment = tl.program_id(0)
    begin = tl.load(cu_seqlens_start + segment)
    length = tl.load(cu_seqlens_start + segment + 1) - begin - before - after
    count = (length + tokens - 1) // tokens
    width: tl.constexpr = 2 * dim if variance else dim
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    block = tl.arange(0, blocks)[:, None]
    place = partial_start + (begin // tokens + segment + block).to(tl.int64) * width + column[None, :]
    pooled_place = pooled_start + segment.to(tl.int64) * width + column
    kept = column < dim
    if maximum:
        result = tl.full([blocks, columns], float("-inf"), tl.float32)
        nan = tl.zeros([blocks, columns], tl.float32)
        for done in range(0, count, blocks):
            x = tl.load(place + done * width, mask=(done + block < count) & kept[None, :], other=float("-inf"))
            nan += tl.where(x != x, x, 0.0)
            result = tl.maximum(result, tl.where(x != x, float("-inf"), x))
        tl.store(pooled_place, tl.max(result, 0) + tl.sum(nan, 0), mask=kept)
    else:
        total = tl.zeros([blocks, columns], tl.float32)
        for done in range(0, count, blocks):
            total += tl.load(place + done * width, mask=(done + block < count) & kept[None, :], other=0.0)
        mean = tl.div_rn(tl.sum(total, 0), length.to(tl.float32))
        tl.store(pooled_place, mean, mask=kept)
        if variance:
            squares = tl.zeros([blocks, columns], tl.float32)
            for done in range(0, count, blocks):
                inside = (done + block < count) & kept[None, :]
                share = tl.maximum(tl.minimum(length - (done + block) * tokens, tokens), 1).to(tl.float32)
                center = tl.div_rn(tl.load(place + done * width, mask=inside, other=0.0), share)
                distance = tl.where(inside, center - mean[None, :], 0.0)
                squares += tl.load(place + done * width + dim, mask=inside, other=0.0) + share * distance * distance
            tl.store(pooled_place + dim, tl.div_rn(tl.sum(squares, 0), length.to(tl.float32)), mask=kept)
