"""Windows of long proteins: overlapping, each framed by cls and eos, blended to one vector a residue.

A residue's vector is the mean of those it has in the windows that hold it, weighted by how far it is from the nearest
end of the window: residue i of a window of n counts min(i + 1, n - i). So the middle of a window, which has seen
most of its surroundings, counts most, and no residue jumps where a window ends. A sequence of one window keeps its
bits.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from seqpack.packs import Pack, boundaries


def blend(hidden: torch.Tensor, pack: Pack) -> tuple[torch.Tensor, Pack]:
    """Blend the hidden states of windows.

    Args:
        hidden: float32 (num_tokens, dim), of the pack's segments.
        pack: with `windows`.

    Returns:
        The hidden states of sequences, (num_blended, dim): each has a first vector, the mean of its windows' first
        weighted by their residues, then one a residue, then a last vector likewise; and a pack that says where each
        sequence begins (its tokens mean nothing).
    """
    assert pack.windows is not None
    offsets = boundaries(pack.lengths).tolist()
    begins, stride = pack.windows.begins.tolist(), pack.windows.stride
    blended = []
    for first, last in pairwise(begins):
        whole = hidden[offsets[first] : offsets[last]]
        blended.append(whole if last - first == 1 else _blend_one(whole, pack.lengths[first:last].tolist(), stride))
    lengths = np.array([len(states) for states in blended], np.int64)
    states = torch.cat(blended)
    cu_seqlens = torch.from_numpy(boundaries(lengths)).to(hidden.device)
    return states, Pack(torch.empty(len(states), dtype=torch.uint8, device=hidden.device), cu_seqlens, lengths)


def _blend_one(hidden: torch.Tensor, lengths: list[int], stride: int) -> torch.Tensor:
    """Blend one sequence's windows, in order, so that the sum has the same bits every time."""
    num_residues = stride * (len(lengths) - 1) + lengths[-1] - 2
    states = hidden.new_zeros(num_residues + 2, hidden.shape[1])
    total = hidden.new_zeros(num_residues + 2, 1)
    for number, window in enumerate(hidden.split(lengths)):
        count = len(window) - 2
        places = torch.arange(1, count + 1, device=hidden.device)
        weights = torch.minimum(places, places.flip(0)).to(hidden.dtype)[:, None]
        span = slice(1 + number * stride, 1 + number * stride + count)
        states[span] += window[1:-1] * weights
        total[span] += weights
        for end in (0, -1):
            states[end] += window[end] * count
            total[end] += count
    return states / total
