"""Windows of long proteins: overlapping, each framed by cls and eos, blended to one vector a residue.

A residue's vector is the mean of those it has in the windows that hold it, weighted by how far it is from the nearest
end of the window: residue i of a window of n counts min(i + 1, n - i). So the middle of a window, which has seen
most of its surroundings, counts most, and no residue jumps where a window ends. A sequence of one window keeps its
bits.
"""

from __future__ import annotations

import numpy as np
import torch

from seqpack.packs import Pack, boundaries


class Blender:
    """Blends the windows of a pack as they come, so that they need not be kept.

    Args:
        pack: with `windows`.
        dim: numbers in the vector of a token.
        device: where the sums are.
    """

    def __init__(self, pack: Pack, dim: int, device: torch.device) -> None:
        assert pack.windows is not None
        self._windows = pack.windows
        firsts, counts = pack.windows.begins[:-1], np.diff(pack.windows.begins)
        # The last window ends where the sequence does; all before it are a stride apart.
        lengths = (counts - 1) * pack.windows.stride + pack.lengths[firsts + counts - 1]
        self._lengths, self._counts = lengths, counts
        self._sequence_of_segment = np.repeat(np.arange(len(counts)), counts)
        self._place_of_segment = np.arange(len(pack.lengths)) - np.repeat(firsts, counts)
        self._states = torch.zeros(int(lengths.sum()), dim, device=device)
        self._total = torch.zeros(int(lengths.sum()), 1, device=device)
        self._begins = boundaries(lengths).tolist()
        self._next = 0

    def add(self, hidden: torch.Tensor, lengths: np.ndarray) -> None:
        """Take the hidden states (num_tokens, dim), float32, of the next segments, of so many tokens each.

        They are added one after the other, so that a sum has the same bits every time.
        """
        for window in hidden.to(self._states.device).split(lengths.tolist()):
            sequence, place = self._sequence_of_segment[self._next], self._place_of_segment[self._next]
            self._next += 1
            span = slice(self._begins[sequence], self._begins[sequence + 1])
            self._add(self._states[span], self._total[span], window, int(place), self._counts[sequence] == 1)

    def _add(
        self, states: torch.Tensor, total: torch.Tensor, window: torch.Tensor, place: int, is_whole: bool
    ) -> None:
        if is_whole:  # keeps its bits
            states.copy_(window)
            total.fill_(1)
            return
        count = len(window) - 2
        places = torch.arange(1, count + 1, device=window.device)
        weights = torch.minimum(places, places.flip(0)).to(window.dtype)[:, None]
        span = slice(1 + place * self._windows.stride, 1 + place * self._windows.stride + count)
        states[span] += window[1:-1] * weights
        total[span] += weights
        for end in (0, -1):
            states[end] += window[end] * count
            total[end] += count

    def finish(self) -> tuple[torch.Tensor, Pack]:
        """Return the hidden states of sequences, and a pack that says where each begins (its tokens mean nothing).

        Each sequence has a first vector, the mean of its windows' first weighted by their residues, then one a
        residue, then a last vector likewise.
        """
        device = self._states.device
        cu_seqlens = torch.from_numpy(boundaries(self._lengths)).to(device)
        nothing = torch.empty(len(self._states), dtype=torch.uint8, device=device)
        return self._states.div_(self._total), Pack(nothing, cu_seqlens, self._lengths)
