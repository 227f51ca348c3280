"""Attention with biases by distance over a pack on CUDA, written in Triton, without padding or a matrix of biases.

Online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867) over blocks of keys, as in FlashAttention (Dao et al.
2022, arXiv:2205.14135). Each program computes a block of queries of one sequence and head. It reads the sequence's keys
in order, in blocks whose shape depends only on the dtype and the head dimension and is never tuned at run time, so its
bits do not depend on the rest of the pack.
"""

from __future__ import annotations  # triton may be missing

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from seqmill.model.out_of_memory import is_out_of_memory

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU build does not include it
    triton = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 128
LOG2_E = math.log2(math.e)


def alibi_attention(qkv: torch.Tensor, slopes: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Let each sequence attend to itself, with scores scaled by head_dim ** -0.5, less slope x distance.

    Scores and sums are float32; float32 products are full precision, not TF32. A non-finite float16 score gives NaN,
    never a weight of zero.

    Args:
        qkv: (num_tokens, 3, num_heads, head_dim), float32, bfloat16 or float16, contiguous.
        slopes: float32 (num_heads,); see `alibi.slopes`.
        cu_seqlens: int32 (num_sequences + 1,), where each sequence begins, and the end.

    Returns:
        (num_tokens, num_heads * head_dim), in the dtype of `qkv`.
    """
    assert slopes.shape == qkv.shape[2:3]
    return _launch(qkv, slopes, cu_seqlens, LOG2_E * qkv.shape[3] ** -0.5, span=0)


def relative_attention(qkv: torch.Tensor, biases: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Let each sequence attend to itself, with scores that are not scaled, plus a bias by relative position.

    Args:
        qkv, cu_seqlens: as for `alibi_attention`.
        biases: float32 (num_heads, 2 * span + 1), contiguous: the bias of a key `span` or more positions before its
            query first, that of one `span` or more after it last.

    Returns:
        As `alibi_attention`.
    """
    assert biases.is_contiguous()
    assert len(biases) == qkv.shape[2]
    return _launch(qkv, biases, cu_seqlens, LOG2_E, span=biases.shape[1] // 2)


def _launch(qkv: torch.Tensor, biases: torch.Tensor, cu_seqlens: torch.Tensor, scale: float, span: int) -> torch.Tensor:
    num_tokens, _, num_heads, head_dim = qkv.shape
    assert qkv.dtype in DTYPES
    assert qkv.is_contiguous()
    assert head_dim <= MAX_HEAD_DIM
    assert biases.dtype == torch.float32
    assert cu_seqlens.dtype == torch.int32
    output = torch.empty((num_tokens, num_heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    num_sequences = len(cu_seqlens) - 1
    columns = max(triton.next_power_of_2(head_dim), 16)  # the minimum for tl.dot
    queries, keys, warps, stages = _blocks(qkv.dtype, columns)
    # Each sequence needs at most one block more than its tokens fill.
    grid = (num_tokens // queries + num_sequences, num_heads)
    shape = (num_heads, head_dim, columns, queries, keys, span)
    _attention[grid](qkv, biases, cu_seqlens, output, scale, num_sequences, *shape, num_warps=warps, num_stages=stages)
    return output


def _blocks(dtype: torch.dtype, columns: int) -> tuple[int, int, int, int]:
    """Return queries and keys per block, warps and stages, with which almost no registers spill on sm_80 and sm_90.

    Other values were not measured. Float32 products can't use tensor cores, and their operands fill the registers.
    """
    if dtype == torch.float32:
        return 32, 32, 4, 2
    return 128, 64 if columns <= 64 else 32, 8, 3


@functools.cache
def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, is_relative: bool) -> str:
    """Return why the kernel does not run on a CUDA device; empty if it does. Compiles and runs it once."""
    if triton is None:
        return "triton is not installed"
    try:
        biases, boundaries = torch.ones(1, device=device), torch.tensor([0, 1], dtype=torch.int32, device=device)
        qkv = torch.ones(1, 3, 1, head_dim, dtype=dtype, device=device)
        if is_relative:
            relative_attention(qkv, biases.expand(1, 3).contiguous(), boundaries)
        else:
            alibi_attention(qkv, biases, boundaries)
        torch.cuda.synchronize(device)
    except Exception as error:  # Triton raises many kinds: no C compiler, no cache folder, too old a GPU
        if is_out_of_memory(error):  # it may pass, and this answer is for the whole run
            raise
        return f"Triton's kernel does not run ({error})"
    return ""


def _jit(kernel: Callable[..., None]) -> Any:  # noqa: ANN401
    # Otherwise variants for one sequence and for multiples of 16 would be compiled in the middle of a run.
    return triton.jit(kernel, do_not_specialize=["num_sequences"]) if triton else kernel


@_jit
def _sequence_of(
    program: tl.tensor, cu_seqlens_start: tl.tensor, num_sequences: int, queries: tl.constexpr
) -> tl.tensor:
    """Return the sequence of a program.

    Sequence s has the programs from cu_seqlens[s] // queries + s on, enough for its blocks; bisection finds s.
    """
    sequence, after = 0, num_sequences
    while after - sequence > 1:
        middle = (sequence + after) // 2
        if tl.load(cu_seqlens_start + middle) // queries + middle <= program:
            sequence = middle
        else:
            after = middle
    return sequence


@_jit
def _attention(
    qkv_start: tl.tensor,
    biases_start: tl.tensor,
    cu_seqlens_start: tl.tensor,
    output_start: tl.tensor,
    scale: float,
    num_sequences: int,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    columns: tl.constexpr,
    queries: tl.constexpr,
    keys: tl.constexpr,
    span: tl.constexpr,
) -> None:
    program, head = tl.program_id(0), tl.program_id(1)
    sequence = _sequence_of(program, cu_seqlens_start, num_sequences, queries)
    begin = tl.load(cu_seqlens_start + sequence)
    length = tl.load(cu_seqlens_start + sequence + 1) - begin
    first = (program - begin // queries - sequence) * queries
    if first >= length:
        return
    stride, width = 3 * num_heads * head_dim, num_heads * head_dim
    query, key, column = tl.arange(0, queries), tl.arange(0, keys), tl.arange(0, columns)
    kept = (first + query < length)[:, None] & (column < head_dim)[None, :]
    start = qkv_start + begin.to(tl.int64) * stride + head * head_dim
    q_place = start + first.to(tl.int64) * stride + query[:, None] * stride + column[None, :]
    k_place = start + width + key[None, :] * stride + column[:, None]
    v_place = start + 2 * width + key[:, None] * stride + column[None, :]
    q = tl.load(q_place, mask=kept, other=0.0)
    log2_e: tl.constexpr = 1.4426950408889634  # scores are in units of log2
    if span == 0:
        slope = tl.load(biases_start + head) * log2_e
    else:
        own = biases_start + head * (2 * span + 1) + span  # the bias of the query's own position
    largest, total = tl.full([queries], float("-inf"), tl.float32), tl.zeros([queries], tl.float32)
    sums = tl.zeros([queries, columns], tl.float32)
    for place in range(0, length, keys):
        inside = place + key < length
        k = tl.load(k_place, mask=inside[None, :] & (column < head_dim)[:, None], other=0.0)
        v = tl.load(v_place, mask=inside[:, None] & (column < head_dim)[None, :], other=0.0)
        products = tl.dot(q, k, input_precision="ieee")
        distance = (place + key)[None, :] - (first + query)[:, None]
        if span == 0:
            scores = products * scale - slope * tl.abs(distance).to(tl.float32)
        else:
            scores = products * scale + log2_e * tl.load(own + tl.minimum(tl.maximum(distance, -span), span))
        if q.dtype == tl.float16:
            scores += 0.0 * products  # NaN if a query or key overflowed, even if the score is -inf
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
        largest = new
        k_place += keys * stride
        v_place += keys * stride
    output_place = output_start + (begin + first).to(tl.int64) * width + head * head_dim
    output_place += query[:, None] * width + column[None, :]
    tl.store(output_place, (sums / total[:, None]).to(output_start.dtype.element_ty), mask=kept)
