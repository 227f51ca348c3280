"""Attention over a pack, behind one function with interchangeable kernels.

| kernel | where | how |
|---|---|---|
| avx512 | CPU, bfloat16, AVX512-BF16 and a C compiler | our own, with the rotation fused: `seqpack.kernels.avx512` |
| varlen | CUDA of compute capability 8.0 and later, 16-bit | `torch.nn.attention.varlen`: FlashAttention 2 |
| sdpa | everywhere | PyTorch's, over runs of sequences of equal length, without padding or mask |

`choose_kernel` takes the first that the device, the dtype and the installation allow.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F

from seqpack.kernels import avx512
from seqpack.packs import Pack

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Pack], torch.Tensor]


def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return the name of the fastest kernel that can be used."""
    if device.type == "cpu" and dtype == torch.bfloat16 and head_dim in avx512.HEAD_DIMS and avx512.load():
        return "avx512"
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and has_varlen(device):
        return "varlen"
    return "sdpa"


def has_varlen(device: torch.device) -> bool:
    """Whether PyTorch's variable-length FlashAttention runs on a CUDA device."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None  # PyTorch 2.10 and later


def attend(kernel: str, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Rotate queries and keys, then let each sequence attend over itself, scores scaled by head_dim ** -0.5.

    Args:
        kernel: a name from `choose_kernel`.
        qkv: (num_tokens, 3, num_heads, head_dim).
        cos, sin: (at least the longest length, head_dim), float32 or float64; see `esm2.rope_tables`.
        pack: where the sequences begin.

    Returns:
        (num_tokens, num_heads * head_dim), in the dtype of `qkv`.
    """
    return KERNELS[kernel](qkv, cos, sin, pack)


def rotate(qk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the rotary position embedding (Su et al. 2021, arXiv:2104.09864) by halves of the head dimension.

    Args:
        qk: (num_tokens, 2, num_heads, head_dim).
        cos, sin: (num_tokens, head_dim), float32 or float64; the product is rounded to the dtype of `qk` once.
    """
    first, second = qk.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (qk * cos[:, None, None] + rotated * sin[:, None, None]).to(qk.dtype)


def _sdpa(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pack: Pack) -> torch.Tensor:
    num_tokens, _, num_heads, head_dim = qkv.shape
    q, k = rotate(qkv[:, :2], cos[pack.positions], sin[pack.positions]).unbind(1)
    v = qkv[:, 2]
    output = torch.empty((num_tokens, num_heads, head_dim), dtype=v.dtype, device=v.device)
    for start, count, length in pack.runs:
        run = slice(start, start + count * length)
        dense = (t[run].view(count, length, num_heads, head_dim).transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(*dense)
        output[run].view(count, length, num_heads, head_dim).copy_(attended.transpose(1, 2))
    return output.view(num_tokens, num_heads * head_dim)


def _varlen(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pack: Pack) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k = rotate(qkv[:, :2], cos[pack.positions], sin[pack.positions]).unbind(1)
    longest = int(pack.lengths.max())
    scale = qkv.shape[-1] ** -0.5
    output = varlen_attn(q, k, qkv[:, 2], pack.cu_seqlens, pack.cu_seqlens, longest, longest, scale=scale)
    return output.flatten(1)


def _avx512(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pack: Pack) -> torch.Tensor:
    return avx512.rope_attention(qkv, cos, sin, pack.lengths)


KERNELS: dict[str, Attention] = {"avx512": _avx512, "sdpa": _sdpa, "varlen": _varlen}
