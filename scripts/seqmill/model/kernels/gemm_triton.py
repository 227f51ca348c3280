"""Matrix products on CUDA with the elementwise step that follows them in the same kernel, written in Triton.

A product is summed in float32 and rounded once, after its bias and its epilogue: nothing, the exact (erf) GELU, or the
rotation of queries and keys. The separate kernels round the product first, so theirs is one rounding more, and results
differ by that rounding. Each program computes tiles of the result one after another, in an order that keeps rows and
columns in the L2 cache. A row is summed in the same order in any tile, over the whole depth, and the shape of a tile
depends only on the epilogue and the GPU, so its bits do not depend on the rest of the pack.

No GPU has measured it: `ESM2` uses it only if asked to.
"""

from __future__ import annotations  # triton may be missing

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from seqmill.model.out_of_memory import is_out_of_memory

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # torch's CPU build does not include it
    triton = None

DTYPES = (torch.bfloat16, torch.float16)
MIN_CAPABILITY, TMA_CAPABILITY = 80, 90
NONE, GELU, ROTATION = "none", "gelu", "rotation"
GROUP = 8  # rows of tiles that are computed together
INTERPRETER = (90, 3)  # capability and multiprocessors that Triton's interpreter stands for


class Tile(NamedTuple):
    """How a product is divided: rows and columns of the result per tile, and the depth of one step."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    flatten: bool  # loads of the next tile begin before the end of this one


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool = False) -> torch.Tensor:
    """Return x @ weight.T + bias, or its exact (erf) GELU: (num_tokens, columns), in the dtype of x.

    Args:
        x: (num_tokens, depth), bfloat16 or float16, contiguous; depth is a multiple of 8.
        weight: (columns, depth), in the dtype of x, contiguous.
        bias: (columns,), in the dtype of x; None adds nothing.
        gelu: whether the GELU follows.
    """
    output = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, output, GELU if gelu else NONE)
    return output


def rotated_qkv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    head_dim: int,
) -> torch.Tensor:
    """Return x @ weight.T + bias with queries and keys rotated as by `fused.rotate`: (num_tokens, 3, heads, head_dim).

    Args:
        x, weight, bias: as for `linear`; weight is (3 * heads * head_dim, depth).
        cos, sin: float32 (more than the largest position, head_dim), contiguous; see `esm2.rope_tables`.
        positions: int64 (num_tokens,), the position of each token in its sequence.
        head_dim: even.
    """
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert cos.shape[1] == sin.shape[1] == head_dim
    assert positions.shape == (len(x),)
    output = torch.empty((len(x), 3, len(weight) // (3 * head_dim), head_dim), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, output, ROTATION, (cos, sin, positions), head_dim)
    return output


@functools.cache
def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return why the kernels do not run on a device; empty if they do. Compiles and runs them once."""
    if device.type != "cuda":
        return f"they run on a CUDA device, and the device is {device.type}"
    if dtype not in DTYPES:
        return f"they compute in bfloat16 or float16, and the precision is {str(dtype).removeprefix('torch.')}"
    if triton is None:
        return "triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if major * 10 + minor < MIN_CAPABILITY:
        return f"they need compute capability 8.0, and the GPU has {major}.{minor}"
    try:
        x, weight = (torch.ones(rows, 64, dtype=dtype, device=device) for rows in (1, 3 * head_dim))
        table = torch.ones(1, head_dim, device=device)
        linear(x, weight, weight[:, 0].contiguous(), gelu=True)
        rotated_qkv(x, weight, None, table, table, torch.zeros(1, dtype=torch.int64, device=device), head_dim)
        torch.cuda.synchronize(device)
    except Exception as error:  # Triton raises many kinds: no C compiler, no cache folder, too little shared memory
        if is_out_of_memory(error):  # it may pass
            raise
        return f"Triton's kernels do not run ({error})"
    return ""


def _tile(epilogue: str, capability: int) -> Tile:
    """Return the tile of a 16-bit product, of the head dimensions of ESM-2: the largest without registers that spill.

    From machine code for sm_80, 86, 90, 100 and 120; no GPU has compared it with others. `capability` is 90 for
    compute capability 9.0.
    """
    if capability // 10 == 9:
        return Tile(128, 256, 64, 8, 3, True)
    if capability // 10 == 10:
        return Tile(128, 128, 64, 8, 3, False) if epilogue == ROTATION else Tile(128, 256, 64, 8, 3, True)
    if capability < TMA_CAPABILITY:
        return Tile(128, 128, 32, 8, 4, True) if epilogue == ROTATION else Tile(128, 256, 32, 8, 3, True)
    return Tile(128, 128, 64, 8, 3, True)


def _constants(columns: int, depth: int, epilogue: str, head_dim: int, capability: int) -> dict[str, Any]:
    """Return the constants of a kernel and its options for Triton's compiler, by name."""
    tile = _tile(epilogue, capability)
    half = head_dim // 2
    return {
        "columns": columns,
        "depth": depth,
        "epilogue": epilogue,
        "half": half,
        "padded": triton.next_power_of_2(half) if half else 0,
        "tile_rows": tile.rows,
        "tile_columns": tile.columns,
        "tile_depth": tile.depth,
        "group": GROUP,
        "flatten": tile.flatten,
        "descriptors": capability >= TMA_CAPABILITY,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    epilogue: str,
    rotation: tuple[torch.Tensor | None, ...] = (None, None, None),
    head_dim: int = 0,
) -> None:
    (num_tokens, depth), columns = x.shape, len(weight)
    assert x.dtype in DTYPES
    assert x.dtype == weight.dtype
    assert x.is_contiguous()
    assert weight.is_contiguous()
    assert weight.shape == (columns, depth)
    assert depth % 8 == 0  # 16 bytes
    assert bias is None or (bias.dtype == x.dtype and bias.shape == (columns,))
    capability, programs = _gpu(x.device)
    constants = _constants(columns, depth, epilogue, head_dim, capability)
    rows, width, step = constants["tile_rows"], constants["tile_columns"], constants["tile_depth"]
    half, padded, across = constants["half"], constants["padded"], columns
    factors: tuple[Any, Any] = x, weight
    if head_dim:
        across = columns // half * padded
    if constants["descriptors"]:
        halves = weight.view(-1, half, depth) if half else weight
        block = [width // padded, padded, step] if half else [width, step]
        factors = TensorDescriptor.from_tensor(x, [rows, step]), TensorDescriptor.from_tensor(halves, block)
    tiles = triton.cdiv(num_tokens, rows) * triton.cdiv(across, width)
    _product[(min(tiles, programs),)](*factors, bias, *rotation, output, num_tokens, **constants)


@functools.cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """Return the compute capability and the number of multiprocessors."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def _jit(kernel: Callable[..., Any]) -> Any:  # noqa: ANN401
    # Otherwise variants for one token and for multiples of 16 would be compiled in the middle of a run.
    return triton.jit(kernel, do_not_specialize=["num_tokens"]) if triton else kernel


@_jit
def _gelu(x: tl.tensor) -> tl.tensor:
    # GELU(x) = max(x, 0) - |x| P(-|x|), P the normal distribution; log2 P(-t) is a polynomial, fitted for t up to 5.7
    # (beyond, P is below 6e-9). Within 3e-7 of the exact value, and a third of the instructions of erf.
    t = tl.abs(x)
    power = -9.42562678574177e-07 * t + 1.4912406346388161e-05
    power = power * t - 5.963421062915586e-05
    power = power * t - 0.000472359883133322
    power = power * t + 0.0075470213778316975
    power = power * t - 0.052865587174892426
    power = power * t - 0.45907557010650635
    power = power * t - 1.1511211395263672
    return tl.maximum(x, 0.0) - t * tl.exp2(power * t - 1.0)


@_jit
def _rotate(
    sums: tl.tensor,
    cos_start: tl.tensor,
    sin_start: tl.tensor,
    positions_start: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    num_tokens: tl.tensor,
    end: tl.constexpr,  # the first column of the values
    half: tl.constexpr,
    padded: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> tl.tensor:
    heads: tl.constexpr = tile_columns // (2 * padded)
    token, pair = row + tl.arange(0, tile_rows), tl.arange(0, padded)
    position = tl.load(positions_start + token, mask=token < num_tokens, other=0).to(tl.int32)
    # Both halves of a table's row have the same angles.
    angle = position[:, None] * (2 * half) + pair[None, :]
    cos = tl.load(cos_start + angle, mask=(pair < half)[None, :], other=0.0)[:, None, :]
    sin = tl.load(sin_start + angle, mask=(pair < half)[None, :], other=0.0)[:, None, :]
    first, second = sums.reshape(tile_rows, heads, 2, padded).permute(0, 1, 3, 2).split()
    new_first, new_second = first * cos - second * sin, second * cos + first * sin
    if end % tile_columns != 0:  # a tile may have keys and values
        rotated = (column + tl.arange(0, heads) * (2 * padded) < end)[None, :, None]
        new_first, new_second = tl.where(rotated, new_first, first), tl.where(rotated, new_second, second)
    return tl.join(new_first, new_second).permute(0, 1, 3, 2).reshape(tile_rows, tile_columns)


@_jit
def _product(
    x_start: tl.tensor,  # a descriptor, if `descriptors`
    weight_start: tl.tensor,  # the same; of (columns / half, half, depth), if `half`
    bias_start: tl.tensor,
    cos_start: tl.tensor,
    sin_start: tl.tensor,
    positions_start: tl.tensor,
    output_start: tl.tensor,
    num_tokens: tl.tensor,
    columns: tl.constexpr,
    depth: tl.constexpr,
    epilogue: tl.constexpr,
    half: tl.constexpr,  # of the head dimension; 0 without a rotation
    padded: tl.constexpr,  # the columns that half a head has in a tile, a power of two
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_depth: tl.constexpr,
    group: tl.constexpr,
    flatten: tl.constexpr,
    descriptors: tl.constexpr,
) -> None:
    across: tl.constexpr = columns // half * padded if half else columns  # columns of all tiles
    tiles_across: tl.constexpr = (across + tile_columns - 1) // tile_columns
    tiles_down = tl.cdiv(num_tokens, tile_rows)
    for tile in tl.range(tl.program_id(0), tiles_down * tiles_across, tl.num_programs(0), flatten=flatten):
        group_row = tile // (group * tiles_across) * group
        group_rows = tl.minimum(tiles_down - group_row, group)
        place = tile % (group * tiles_across)
        row = (group_row + place % group_rows) * tile_rows
        column = place // group_rows * tile_columns
        token, in_tiles = row + tl.arange(0, tile_rows), column + tl.arange(0, tile_columns)
        if half == padded:
            result = in_tiles
            inside = in_tiles < columns
        else:
            result = in_tiles // padded * half + in_tiles % padded
            inside = (in_tiles < across) & (in_tiles % padded < half)
        sums = tl.zeros([tile_rows, tile_columns], tl.float32)
        if descriptors:
            for k in tl.range(0, depth, tile_depth):
                rows = x_start.load([row, k])
                if half:
                    weights = weight_start.load([column // padded, 0, k]).reshape(tile_columns, tile_depth)
                else:
                    weights = weight_start.load([column, k])
                sums = tl.dot(rows, weights.T, sums)
        else:
            # Outside the result, the first row and column are computed again; their sums are not stored.
            k = tl.arange(0, tile_depth)
            row_place = x_start + tl.where(token < num_tokens, token, 0).to(tl.int64)[:, None] * depth + k[None, :]
            weight_place = weight_start + tl.where(inside, result, 0)[None, :] * depth + k[:, None]
            for done in tl.range(0, depth, tile_depth):
                if depth % tile_depth == 0:
                    rows = tl.load(row_place)
                    weights = tl.load(weight_place)
                else:
                    rows = tl.load(row_place, mask=(done + k < depth)[None, :], other=0.0)
                    weights = tl.load(weight_place, mask=(done + k < depth)[:, None], other=0.0)
                sums = tl.dot(rows, weights, sums)
                row_place += tile_depth
                weight_place += tile_depth
        if bias_start is not None:
            sums += tl.load(bias_start + result, mask=inside, other=0.0).to(tl.float32)[None, :]
        if epilogue == "gelu":
            sums = _gelu(sums)
        if epilogue == "rotation":
            end: tl.constexpr = across // 3 * 2
            if column < end:
                sums = _rotate(
                    sums,
                    cos_start,
                    sin_start,
                    positions_start,
                    row,
                    column,
                    num_tokens,
                    end,
                    half,
                    padded,
                    tile_rows,
                    tile_columns,
                )
        output_place = output_start + token.to(tl.int64)[:, None] * columns + result[None, :]
        stored = (token < num_tokens)[:, None] & inside[None, :]
        tl.store(output_place, sums.to(output_start.dtype.element_ty), mask=stored)
