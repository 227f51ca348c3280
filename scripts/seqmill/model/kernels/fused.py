"""Elementwise steps of the forward on CUDA, each in one pass over memory, written in Triton.

The arithmetic equals that of the eager forms (`layers.Norm`, `attention.rotate`, `dnabert_s.Layer`): float32
throughout, rounded once when the result is stored. Each row or token is one program with a reduction of fixed shape,
never tuned at run time, so its bits do not depend on its neighbors.
"""

from __future__ import annotations  # triton may be missing

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from seqmill.model.kernels import pool_triton
from seqmill.model.out_of_memory import is_out_of_memory

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU build does not include it
    triton = None

log = logging.getLogger(__name__)

GATE_BLOCK, GATE_WARPS = 1024, 4


def add_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
    post: bool = False,
    centered: bool = True,
) -> torch.Tensor:
    """Add to the residual stream, and return the layer norm of the sum (Ba et al. 2016, arXiv:1607.06450).

    Without `centered` it is the RMS norm (Zhang & Sennrich 2019, arXiv:1910.07467). The variance is the mean of squared
    differences from the mean; each row is held in registers.

    Args:
        x: float32 (num_tokens, hidden_dim), contiguous; becomes x + delta, or the layer norm of that if `post`.
        delta: (num_tokens, hidden_dim), any floating dtype, contiguous; None adds nothing.
        weight, bias: float32 (hidden_dim,); None adds no bias.
        eps: added to the variance.
        dtype: of the result.
        post: keep the unrounded result in x; for float32 the result is x itself.
        centered: subtract the mean first.

    Returns:
        (num_tokens, hidden_dim).
    """
    num_tokens, dim = x.shape
    assert x.dtype == weight.dtype == torch.float32
    assert bias is None or bias.dtype == torch.float32
    assert x.is_contiguous()
    assert delta is None or (delta.is_contiguous() and delta.shape == x.shape)
    y = x if post and dtype == torch.float32 else torch.empty_like(x, dtype=dtype)
    block, warps = norm_block(dim)
    kind = (delta is not None, bias is not None, centered, post)
    _norm[(num_tokens,)](x, delta, weight, bias, y, eps, dim, block, *kind, num_warps=warps)
    return y


def gate(h: torch.Tensor, silu: bool = False) -> torch.Tensor:
    """Return the exact (erf) GELU, or SiLU, of the first half of each row times the second: (num_tokens, dim).

    `h` is (num_tokens, 2 * dim), any floating dtype but float64, contiguous.
    """
    num_tokens, dim = h.shape[0], h.shape[1] // 2
    assert h.is_contiguous()
    gated = torch.empty((num_tokens, dim), dtype=h.dtype, device=h.device)
    _gate[(num_tokens, triton.cdiv(dim, GATE_BLOCK))](h, gated, dim, GATE_BLOCK, silu, num_warps=GATE_WARPS)
    return gated


def rotate(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> None:
    """Apply the rotary position embedding to queries and keys in place, as `attention.rotate` does.

    In float16, a query or key that is not finite makes the value of its token, head and column NaN, as
    `attention.show_overflow` does, without another pass.

    Args:
        qkv: (num_tokens, 3, num_heads, head_dim), any floating dtype but float64, contiguous.
        cos, sin: float32 (more than the largest position, head_dim), contiguous; see `esm2.rope_tables`.
        positions: int64 (num_tokens,), the position of each token in its sequence.
        norms: weights, float32 (num_heads * head_dim,), of layer norms of queries and of keys before the rotation, and
            the number that is added to the variance, as in `attention.normalize`.
    """
    num_tokens, _, num_heads, head_dim = qkv.shape
    assert cos.dtype == sin.dtype == torch.float32
    assert qkv.is_contiguous()
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    rows, columns, warps = rotation_blocks(num_heads, head_dim)
    q_weight, k_weight, eps = norms or (None, None, 0.0)
    shape = (num_heads, head_dim // 2, rows, columns, norms is not None)
    _rotate[(num_tokens,)](qkv, cos, sin, positions, q_weight, k_weight, eps, *shape, num_warps=warps)


def norm_block(dim: int) -> tuple[int, int]:
    """Return the columns of a row, up to a power of two, and the warps that `_norm` has for it."""
    block = _next_power_of_2(dim)
    return block, min(max(block // 256, 1), 16)


def rotation_blocks(num_heads: int, head_dim: int) -> tuple[int, int, int]:
    """Return the rows (heads of queries and keys) and columns (half a head) of a token, and the warps of `_rotate`."""
    rows, columns = _next_power_of_2(2 * num_heads), _next_power_of_2(head_dim // 2)
    return rows, columns, min(max(rows * columns // 256, 1), 8)


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


@functools.cache
def available(device: torch.device) -> bool:
    """Return whether these kernels run on a device: on CUDA, with Triton; otherwise the log says why."""
    if device.type != "cuda":
        return False
    if triton is None:
        log.warning("triton is not installed: elementwise steps on the GPU will be slower")
        return False
    try:
        x = torch.ones(1, 16, device=device)
        add_norm(x, x.bfloat16(), x[0], x[0], 1e-5, torch.bfloat16)
        add_norm(x.clone(), x.bfloat16(), x[0], x[0], 1e-5, torch.bfloat16, post=True)
        add_norm(x.clone(), x.bfloat16(), x[0], None, 1e-5, torch.bfloat16, centered=False)
        qkv, positions = x.view(1, 1, 1, 16).repeat(1, 3, 1, 1), torch.zeros(1, dtype=torch.int64, device=device)
        for norms in (None, (x[0], x[0], 1e-5)):
            gate(x.bfloat16(), silu=norms is not None)
            rotate(qkv, x, x, positions, norms)
        segment = torch.arange(2, dtype=torch.int32, device=device)
        for pool in (pool_triton.mean, pool_triton.largest, pool_triton.mean_and_variance):
            pool(x, segment, before=0, after=0)
        torch.cuda.synchronize(device)
    except Exception as error:  # Triton raises many kinds: no C compiler, no cache folder, too old a GPU
        if is_out_of_memory(error):  # it may pass, and this answer is for the whole run
            raise
        log.warning("Triton's kernels can't be compiled: elementwise steps on the GPU will be slower: %s", error)
        return False
    return True


def _jit(kernel: Callable[..., Any]) -> Any:  # noqa: ANN401
    return triton.jit(kernel) if triton else kernel


@_jit
def normalize_row(
    x_start: tl.tensor,
    delta_start: tl.tensor,
    weight_start: tl.tensor,
    bias_start: tl.tensor,
    start: tl.tensor,
    eps: float,
    dim: tl.constexpr,
    block: tl.constexpr,
    has_delta: tl.constexpr,
    has_bias: tl.constexpr = True,
    centered: tl.constexpr = True,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the row of x that begins at `start`, with delta added, and its layer norm: float32 (block,), else 0."""
    column = tl.arange(0, block)
    inside = column < dim
    x = tl.load(x_start + start + column, mask=inside, other=0.0)
    if has_delta:
        x += tl.load(delta_start + start + column, mask=inside, other=0.0).to(tl.float32)
    from_center = x
    if centered:
        mean = tl.sum(x, 0) / dim
        from_center = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(from_center * from_center, 0) / dim
    scale = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    weight = tl.load(weight_start + column, mask=inside, other=0.0)
    y = from_center * scale * weight
    if has_bias:
        y += tl.load(bias_start + column, mask=inside, other=0.0)
    return x, y


@_jit
def _norm(
    x_start: tl.tensor,
    delta_start: tl.tensor,
    weight_start: tl.tensor,
    bias_start: tl.tensor,
    y_start: tl.tensor,
    eps: float,
    dim: tl.constexpr,
    block: tl.constexpr,
    has_delta: tl.constexpr,
    has_bias: tl.constexpr,
    centered: tl.constexpr,
    post: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * dim
    row = (x_start, delta_start, weight_start, bias_start, start)
    x, y = normalize_row(*row, eps, dim, block, has_delta, has_bias, centered)
    column = tl.arange(0, block)
    inside = column < dim
    place = start + column
    if post:
        tl.store(x_start + place, y, mask=inside)
    elif has_delta:
        tl.store(x_start + place, x, mask=inside)
    if not post or y_start.dtype.element_ty != tl.float32:  # else y is x
        tl.store(y_start + place, y.to(y_start.dtype.element_ty), mask=inside)


@_jit
def _gate(
    h_start: tl.tensor, gated_start: tl.tensor, dim: tl.constexpr, block: tl.constexpr, silu: tl.constexpr
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < dim
    gate = tl.load(h_start + token * (2 * dim) + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(h_start + token * (2 * dim) + dim + column, mask=inside, other=0.0).to(tl.float32)
    erf = tl.erf(gate * 0.7071067811865476)
    activated = tl.div_rn(gate, 1.0 + tl.exp(-gate)) if silu else 0.5 * gate * (1.0 + erf)
    tl.store(gated_start + token * dim + column, (activated * value).to(gated_start.dtype.element_ty), mask=inside)


@_jit
def _of_both(x: tl.tensor, is_query: tl.tensor) -> tl.tensor:
    """Return for each row (rows, 1) the sum over the rows of x that are queries, if it is one, or over the others."""
    of_rows = tl.sum(x, 1)[:, None]
    of_queries = tl.sum(tl.where(is_query, of_rows, 0.0))
    of_keys = tl.sum(tl.where(is_query, 0.0, of_rows))
    return tl.where(is_query, of_queries, of_keys)


@_jit
def _rotate(
    qkv_start: tl.tensor,
    cos_start: tl.tensor,
    sin_start: tl.tensor,
    positions_start: tl.tensor,
    q_weight_start: tl.tensor,
    k_weight_start: tl.tensor,
    eps: float,
    num_heads: tl.constexpr,
    half: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    has_norms: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, rows)[:, None]  # heads of q, then heads of k
    column = tl.arange(0, columns)[None, :]
    inside = (row < 2 * num_heads) & (column < half)
    first_place = qkv_start + token * (6 * num_heads * half) + row * (2 * half) + column
    second_place = first_place + half
    # Both halves of a table's row have the same angles.
    angle = tl.load(positions_start + token) * (2 * half) + column
    cos = tl.load(cos_start + angle, mask=column < half, other=0.0)
    sin = tl.load(sin_start + angle, mask=column < half, other=0.0)
    first = tl.load(first_place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(second_place, mask=inside, other=0.0).to(tl.float32)
    if has_norms:
        is_query = row < num_heads
        width = 2 * num_heads * half
        # Sums over all heads of the queries, and of the keys.
        mean = _of_both(first + second, is_query) / width
        first, second = tl.where(inside, first - mean, 0.0), tl.where(inside, second - mean, 0.0)
        variance = _of_both(first * first + second * second, is_query) / width
        scale = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
        place = row % num_heads * (2 * half) + column
        queries, keys = inside & is_query, inside & ~is_query
        q_first = tl.load(q_weight_start + place, mask=queries, other=0.0)
        k_first = tl.load(k_weight_start + place, mask=keys, other=0.0)
        q_second = tl.load(q_weight_start + place + half, mask=queries, other=0.0)
        k_second = tl.load(k_weight_start + place + half, mask=keys, other=0.0)
        first *= scale * (q_first + k_first)
        second *= scale * (q_second + k_second)
    dtype = qkv_start.dtype.element_ty
    new_first, new_second = (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)
    tl.store(first_place, new_first, mask=inside)
    tl.store(second_place, new_second, mask=inside)
    if dtype == tl.float16:
        # Attention multiplies every value by a weight, and 0 x NaN is NaN. A query and a key may both store it.
        values = (2 * num_heads - row + row % num_heads) * (2 * half)
        nan = tl.full([rows, columns], float("nan"), dtype)
        tl.store(first_place + values, nan, mask=inside & ~(tl.abs(new_first) < float("inf")))
        tl.store(second_place + values, nan, mask=inside & ~(tl.abs(new_second) < float("inf")))
