"""Attention with linear biases over a pack, behind one function with interchangeable kernels.

ALiBi (Press et al. 2022, arXiv:2108.12409) in the symmetric form of MosaicBERT: the score of a key at distance d from
its query, on either side, is reduced by slope x d; each head has its own slope.

| kernel | where | how |
|---|---|---|
| amx, avx512_bf16, avx512, avx2, neon | CPU, bfloat16 or float32, as in `attention` | our own: `kernels.cpu` |
| triton | CUDA, all precisions | our own, over the pack: `seqmill.model.kernels.biased_triton` |
| flash_attn_2 | CUDA of compute capability 8.0 and later, 16-bit | `flash_attn`, the package of FlashAttention 2 |
| sdpa | everywhere | PyTorch's, over runs of sequences of equal length, without padding |

No kernel builds a matrix of biases: all but sdpa compute each bias from its distance; sdpa uses a view of one row
per head. `choose_kernel` returns the requested kernel, or the first that the device, the dtype and the installation
allow.
"""

import functools
import math

import torch
import torch.nn.functional as F

from seqmill.model import attention
from seqmill.model.attention import by_runs, choose, packed, show_overflow
from seqmill.model.kernels import biased_triton, compiled, cpu
from seqmill.model.pack import Pack
from seqmill.spec.task import AUTO

# triton and flash_attn_2 were not measured against each other; triton also supports float32.
FASTEST_FIRST = (*compiled.KERNELS, "triton", "flash_attn_2", "sdpa")

# Biases per call, over all heads. PyTorch's CPU kernel reads them through the view; a kernel that copies them needs
# 64 MB in float32.
MAX_BIASES = 1 << 24


def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, requested: str = AUTO) -> str:
    """Return the requested kernel's name, or for `auto` that of the fastest usable one; raises as `attention`'s."""
    return choose(requested, FASTEST_FIRST, lambda name: why_not(name, device, dtype, head_dim))


def why_not(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return why a kernel can't be used; empty if it can."""
    if kernel not in FASTEST_FIRST:
        return "it has no linear biases, which DNABERT-S has for positions"
    if kernel != "triton":
        reason = attention.why_not(kernel, device, dtype, head_dim)
        if not reason and kernel == "flash_attn_2" and not attention.takes_biases(kernel):
            reason = "this version of flash_attn has no linear biases, which came with 2.4"
        return reason
    if device.type != "cuda":
        return f"it runs on a CUDA device, and the device is {device.type}"
    if dtype not in biased_triton.DTYPES:
        return f"it computes in float32, bfloat16 or float16, and the precision is {str(dtype).removeprefix('torch.')}"
    if head_dim > biased_triton.MAX_HEAD_DIM:
        return f"it takes head dimensions up to {biased_triton.MAX_HEAD_DIM}; the model's is {head_dim}"
    return biased_triton.why_not(device, dtype, head_dim, is_relative=False)


def slopes(num_heads: int) -> torch.Tensor:
    """Return the slope of each head, float32 (num_heads,).

    They are 2 ** (-8 i / n) for head i = 1 ... n if n is a power of two. Otherwise they are the slopes for the next
    lower power, then every second one for the next higher power, as in the authors' code and DNABERT-S's
    `bert_layers.py`.
    """
    below = 1 << (num_heads.bit_length() - 1)
    powers = [8 * head / below for head in range(1, below + 1)]
    powers += [4 * head / below for head in range(1, 2 * (num_heads - below), 2)]
    return torch.tensor([math.pow(2, -power) for power in powers], dtype=torch.float32)


def bias_table(num_heads: int, max_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the bias of every distance: (num_heads, 2 * max_tokens - 1), distance 0 in the middle.

    The products are always rounded to float32, as in the reference, which keeps float32 biases in a float64 model:
    exact products would change the eighth digit of the output.
    """
    distances = torch.arange(1 - max_tokens, max_tokens).abs()
    return (slopes(num_heads)[:, None] * -distances).to(dtype)


def make_biases(kernel: str, num_heads: int, max_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a kernel's input for its biases: `bias_table` for sdpa, `slopes` for the others."""
    return bias_table(num_heads, max_tokens, dtype) if kernel == "sdpa" else slopes(num_heads)


def attend(kernel: str, qkv: torch.Tensor, biases: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Let each sequence attend to itself, with scores scaled by head_dim ** -0.5, then biased by distance.

    Args:
        kernel: a name from `choose_kernel`.
        qkv: (num_tokens, 3, num_heads, head_dim), contiguous.
        biases: from `make_biases` for this kernel and at least the longest length; float32, or float64 if `qkv` is.
        pack: the boundaries of the sequences.

    Returns:
        (num_tokens, num_heads * head_dim), in the dtype of `qkv`.
    """
    if kernel in compiled.KERNELS:
        return cpu.alibi_attention(kernel, qkv, biases, pack.lengths)
    if kernel == "triton":
        return biased_triton.alibi_attention(qkv, biases, pack.cu_seqlens)
    q, k, v = qkv.unbind(1)
    v = show_overflow(q, k, v)
    if kernel == "sdpa":
        return by_runs(q, k, v, pack, functools.partial(attend_run, biases, None))
    # Without causality and with equally long queries and keys, flash_attn's bias is -slope x |i - j|.
    return packed(kernel, q, k, v, pack, alibi_slopes=biases)


def attend_run(
    biases: torch.Tensor, scale: float | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor
) -> None:
    """Attend with a bias for each distance (`bias_table`), by PyTorch, for a run as in `attention.by_runs`.

    `scale` is that of the scores, None for head_dim ** -0.5.
    """
    # On CUDA PyTorch supports only biases in the dtype of the queries: with 16-bit queries and float32 biases one
    # kernel raises, and another silently misreads them (pytorch pull request 191612).
    dtype = biases.dtype if v.is_cuda else v.dtype
    q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
    _, num_heads, length, _ = q.shape
    step = max(MAX_BIASES // (num_heads * length), 1)
    for first in range(0, length, step):
        last = min(first + step, length)
        # With the queries in reverse order each row of biases is the previous one, shifted by one.
        block, mask = q[:, :, first:last].flip(2), _biases_of_block(biases, first, last, length)
        output[:, :, first:last] = F.scaled_dot_product_attention(block, k, v, attn_mask=mask, scale=scale).flip(2)


def _biases_of_block(biases: torch.Tensor, first: int, last: int, length: int) -> torch.Tensor:
    """Return a view (1, num_heads, last - first, length): rows are queries last - 1 down to first, columns keys."""
    middle = biases.shape[1] // 2
    begin, end = middle - (last - 1), middle - first + length  # the last query's first key, the first's last
    return biases[:, begin:end].unfold(1, length, 1)[None]
