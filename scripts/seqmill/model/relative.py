"""Attention with T5's biases by relative position over a pack, behind one function with interchangeable kernels.

The score of a key is not scaled; a bias by its position relative to the query is added (Raffel et al. 2020,
arXiv:1910.10683). Keys before and after a query have a bucket for each of the nearest distances, then wider ones, and a
last one for all from `span` on; each head has a number for each bucket.

| kernel | where | how |
|---|---|---|
| amx, avx512_bf16, avx512, avx2, neon | CPU, bfloat16 or float32, as in `attention` | our own: `kernels.cpu` |
| triton | CUDA, all precisions | our own, over the pack: `seqmill.model.kernels.biased_triton` |
| sdpa | everywhere | PyTorch's, over runs of sequences of equal length, without padding |

No kernel builds a matrix of biases: sdpa uses a view of one row per head, the others read `span` distances each way.
"""

import functools
import math

import torch

from seqmill.model import attention
from seqmill.model.alibi import attend_run
from seqmill.model.attention import by_runs, choose
from seqmill.model.kernels import biased_triton, compiled, cpu
from seqmill.model.pack import Pack
from seqmill.spec.task import AUTO

FASTEST_FIRST = (*compiled.KERNELS, "triton", "sdpa")


def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, requested: str = AUTO) -> str:
    """Return the requested kernel's name, or for `auto` that of the fastest usable one; raises as `attention`'s."""
    return choose(requested, FASTEST_FIRST, lambda name: why_not(name, device, dtype, head_dim))


def why_not(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return why a kernel can't be used; empty if it can."""
    if kernel not in FASTEST_FIRST:
        return "it has no biases by relative position, which T5 has"
    if kernel != "triton":
        return attention.why_not(kernel, device, dtype, head_dim)
    if device.type != "cuda":
        return f"it runs on a CUDA device, and the device is {device.type}"
    if dtype not in biased_triton.DTYPES:
        return f"it computes in float32, bfloat16 or float16, and the precision is {str(dtype).removeprefix('torch.')}"
    if head_dim > biased_triton.MAX_HEAD_DIM:
        return f"it takes head dimensions up to {biased_triton.MAX_HEAD_DIM}; the model's is {head_dim}"
    return biased_triton.why_not(device, dtype, head_dim, is_relative=True)


def buckets(span: int, num_buckets: int) -> torch.Tensor:
    """Return the bucket of each relative position (key less query) from -span to span: int64 (2 * span + 1,).

    As in transformers' `T5Attention._relative_position_bucket` in both directions, with `span` as the largest distance;
    the logarithms are float32, or a distance could fall into the next bucket.
    """
    positions = torch.arange(-span, span + 1, device="cpu")
    each_way = num_buckets // 2
    exact = each_way // 2
    distances = positions.abs()
    logarithms = torch.log(distances.clamp_min(1).float() / exact) / math.log(span / exact)
    wide = (exact + (logarithms * (each_way - exact)).long()).clamp_max(each_way - 1)
    return torch.where(distances < exact, distances, wide) + each_way * (positions > 0)


def make_biases(kernel: str, weight: torch.Tensor, span: int, max_tokens: int) -> torch.Tensor:
    """Return a kernel's input for its biases, from the weight of each bucket and head (num_buckets, num_heads).

    It is (num_heads, 2 * span + 1), the position `span` before the query first; for sdpa (num_heads,
    2 * max_tokens - 1), and the positions beyond `span` have the bias of the last bucket.
    """
    table = weight[buckets(span, len(weight)).to(weight.device)].T
    if kernel == "sdpa":
        positions = torch.arange(1 - max_tokens, max_tokens, device=weight.device)
        table = table[:, positions.clamp(-span, span) + span]
    return table.contiguous()


def attend(kernel: str, qkv: torch.Tensor, biases: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Let each sequence attend to itself, with scores that are not scaled, plus the biases.

    Args:
        kernel: a name from `choose_kernel`.
        qkv: (num_tokens, 3, num_heads, head_dim), contiguous.
        biases: from `make_biases` for this kernel and at least the longest length; float32, or float64 if `qkv` is.
        pack: the boundaries of the sequences.

    Returns:
        (num_tokens, num_heads * head_dim), in the dtype of `qkv`.
    """
    if kernel in compiled.KERNELS:
        return cpu.relative_attention(kernel, qkv, biases, pack.lengths)
    if kernel == "triton":
        return biased_triton.relative_attention(qkv, biases, pack.cu_seqlens)
    q, k, v = qkv.unbind(1)
    return by_runs(q, k, v, pack, functools.partial(attend_run, biases, 1.0))
