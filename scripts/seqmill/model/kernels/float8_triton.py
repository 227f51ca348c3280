"""The steps before a float8 product on CUDA, each in one pass over memory, written in Triton.

Each row or token is one program. It computes the row in float32, then its scale, and stores the row in e4m3. The
arithmetic equals that of the eager forms in `model.float8`, and a row's bits do not depend on its neighbors. GPUs
convert to e4m3 in hardware; for capability 8.9, Triton first cuts the value to float16, which makes the error of a
rounding larger by at most 1 %.
"""

from __future__ import annotations  # triton may be missing

from collections.abc import Callable
from typing import Any

import torch

from seqmill.model.kernels.fused import normalize_row

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU build does not include it
    triton = None

Rounded = tuple[torch.Tensor, torch.Tensor]  # float8_e4m3fn (rows, width) and float32 scales (rows, 1)


def add_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    post: bool = False,
) -> Rounded:
    """Do what `fused.add_norm` does, with the result in float8; the arguments are the same."""
    num_tokens, dim = x.shape
    assert x.dtype == weight.dtype == bias.dtype == torch.float32
    assert x.is_contiguous()
    assert delta is None or (delta.is_contiguous() and delta.shape == x.shape)
    values, scales = _empty(num_tokens, dim, x.device)
    block = triton.next_power_of_2(dim)
    warps = min(max(block // 256, 1), 16)
    tensors = (x, delta, weight, bias, values, scales)
    _norm[(num_tokens,)](*tensors, eps, dim, block, delta is not None, post, num_warps=warps)
    return values, scales


def round_rows(x: torch.Tensor, gelu: bool = False, gated: bool = False) -> Rounded:
    """Round each row of x.

    Args:
        x: (rows, width), any floating dtype but float64, contiguous.
        gelu: round the exact (erf) GELU of x.
        gated: round the GELU of the first half of each row times the second half.
    """
    assert x.is_contiguous()
    rows, dim = x.shape[0], x.shape[1] // (2 if gated else 1)
    values, scales = _empty(rows, dim, x.device)
    block = triton.next_power_of_2(dim)
    warps = min(max(block // 512, 1), 32)
    _round[(rows,)](x, values, scales, dim, block, gelu, gated, num_warps=warps)
    return values, scales


def _empty(rows: int, dim: int, device: torch.device) -> Rounded:
    values = torch.empty((rows, dim), dtype=torch.float8_e4m3fn, device=device)
    return values, torch.empty((rows, 1), dtype=torch.float32, device=device)


def _jit(kernel: Callable[..., Any]) -> Any:  # noqa: ANN401
    return triton.jit(kernel) if triton else kernel


@_jit
def _norm(
    x_start: tl.tensor,
    delta_start: tl.tensor,
    weight_start: tl.tensor,
    bias_start: tl.tensor,
    values_start: tl.tensor,
    scales_start: tl.tensor,
    eps: float,
    dim: tl.constexpr,
    block: tl.constexpr,
    has_delta: tl.constexpr,
    post: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    x, y = normalize_row(x_start, delta_start, weight_start, bias_start, token * dim, eps, dim, block, has_delta)
    if post:
        tl.store(x_start + token * dim + column, y, mask=column < dim)
    elif has_delta:
        tl.store(x_start + token * dim + column, x, mask=column < dim)
    _store(y, values_start + token * dim, scales_start + token, dim, block)


@_jit
def _round(
    x_start: tl.tensor,
    values_start: tl.tensor,
    scales_start: tl.tensor,
    dim: tl.constexpr,
    block: tl.constexpr,
    gelu: tl.constexpr,
    gated: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < dim
    start = x_start + row * (2 * dim if gated else dim)
    y = tl.load(start + column, mask=inside, other=0.0).to(tl.float32)
    if gelu:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    if gated:
        y *= tl.load(start + dim + column, mask=inside, other=0.0).to(tl.float32)
    _store(y, values_start + row * dim, scales_start + row, dim, block)


@_jit
def _store(
    y: tl.tensor, values_start: tl.tensor, scale_start: tl.tensor, dim: tl.constexpr, block: tl.constexpr
) -> None:
    """Store a row (block,) of float32, 0 beyond `dim`, in e4m3, and its scale."""
    # Magnitudes as integers have the same order, with infinity and then NaN on top: tl.max of floats would drop NaN.
    bits = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    largest = bits.to(tl.float32, bitcast=True)
    # float8.SMALLEST; a row that is not finite has the scale NaN, because conversions to e4m3 saturate.
    largest = tl.where(largest < float("inf"), tl.maximum(largest, 7.888609052210118e-31), float("nan"))
    tl.store(scale_start, tl.div_rn(largest, 448.0))
    column = tl.arange(0, block)
    rounded = (y * tl.div_rn(448.0, largest)).to(tl.float8e4nv)
    tl.store(values_start + column, rounded, mask=column < dim)
