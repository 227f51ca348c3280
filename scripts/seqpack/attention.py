"""Attention over a pack, behind one function."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from seqpack.packs import Pack

KERNEL = "sdpa-runs"  # recorded in the status JSON


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Softmax attention of each sequence over itself, with scores scaled by head_dim ** -0.5.

    Sequences of equal length are one dense batch for PyTorch's scaled_dot_product_attention: exact,
    without padding, on any device.

    Args:
        q, k, v: (num_tokens, num_heads, head_dim).
        pack: where the sequences begin.

    Returns:
        (num_tokens, num_heads * head_dim), in the dtype of `v`.
    """
    num_tokens, num_heads, head_dim = v.shape
    output = torch.empty((num_tokens, num_heads, head_dim), dtype=v.dtype, device=v.device)
    for start, count, length in pack.runs:
        run = slice(start, start + count * length)
        dense = (t[run].view(count, length, num_heads, head_dim).transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(*dense)
        output[run].view(count, length, num_heads, head_dim).copy_(attended.transpose(1, 2))
    return output.view(num_tokens, num_heads * head_dim)
