"""Attention with linear biases over a pack, behind one function with interchangeable kernels.

ALiBi (Press et al. 2022, arXiv:2108.12409) in its symmetric form, as MosaicBERT has it: a key that is d
tokens away from its query, on either side, loses slope x d of its score; each head has a slope of its own.

| kernel | where | how |
|---|---|---|
| sdpa | everywhere | PyTorch's, over runs of sequences of equal length, without padding |

Biases depend on the distance alone, so those of a run are a view of one row a head, never a matrix.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from seqpack.attention import show_overflow
from seqpack.packs import Pack

# Biases of one call, over all heads. PyTorch's CPU kernel reads them through the view; a kernel that copies
# them needs 64 MB in float32.
MAX_BIASES = 1 << 24


def slopes(num_heads: int) -> torch.Tensor:
    """Return the slope of each head, float32 (num_heads,).

    2 ** (-8 i / n) for head i = 1 ... n where n is a power of two. Else the slopes of the power below,
    then every second one of the power above, as the paper's authors and `bert_layers.py` of DNABERT-S do.
    """
    below = 1 << (num_heads.bit_length() - 1)
    powers = [8 * head / below for head in range(1, below + 1)]
    powers += [4 * head / below for head in range(1, 2 * (num_heads - below), 2)]
    return torch.tensor([math.pow(2, -power) for power in powers], dtype=torch.float32)


def bias_table(num_heads: int, max_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the bias of every distance: (num_heads, 2 * max_tokens - 1), distance 0 in the middle.

    The products are rounded to float32 whatever the dtype, as in the reference, whose biases stay in
    float32 in a float64 model: exact ones would differ in the eighth digit of the output.
    """
    distances = torch.arange(1 - max_tokens, max_tokens).abs()
    return (slopes(num_heads)[:, None] * -distances).to(dtype)


def attend(kernel: str, qkv: torch.Tensor, biases: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Let each sequence attend over itself, scores scaled by head_dim ** -0.5, then biased by distance.

    Args:
        kernel: "sdpa".
        qkv: (num_tokens, 3, num_heads, head_dim), contiguous.
        biases: of at least the longest length, see `bias_table`; float32, or float64 for a `qkv` of float64.
        pack: where the sequences begin.

    Returns:
        (num_tokens, num_heads * head_dim), in the dtype of `qkv`.
    """
    q, k, v = qkv.unbind(1)
    return KERNELS[kernel](q, k, show_overflow(q, k, v), biases, pack)


def _by_runs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, biases: torch.Tensor, pack: Pack) -> torch.Tensor:
    num_tokens, num_heads, head_dim = v.shape
    output = torch.empty((num_tokens, num_heads, head_dim), dtype=v.dtype, device=v.device)
    for start, count, length in pack.runs:
        run = slice(start, start + count * length)
        queries, keys, values = (t[run].view(count, length, num_heads, head_dim).transpose(1, 2) for t in (q, k, v))
        outputs = output[run].view(count, length, num_heads, head_dim).transpose(1, 2)
        step = max(MAX_BIASES // (num_heads * length), 1)
        for first in range(0, length, step):
            last = min(first + step, length)
            # From the last query to the first: then each row of biases is the one before, moved by one.
            block = queries[:, :, first:last].flip(2)
            attended = F.scaled_dot_product_attention(
                block, keys, values, attn_mask=_biases_of_block(biases, first, last, length)
            )
            outputs[:, :, first:last] = attended.flip(2)
    return output.view(num_tokens, num_heads * head_dim)


def _biases_of_block(biases: torch.Tensor, first: int, last: int, length: int) -> torch.Tensor:
    """Return a view (1, num_heads, last - first, length): rows are queries last - 1 down to first, columns keys."""
    middle = biases.shape[1] // 2
    begin, end = middle - (last - 1), middle - first + length  # the last query's first key, the first's last
    return biases[:, begin:end].unfold(1, length, 1)[None]


KERNELS = {"sdpa": _by_runs}
