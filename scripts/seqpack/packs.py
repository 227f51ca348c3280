"""A pack on its way through the model: tokens of several sequences end to end, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from seqpack.plan import plan_packs


@dataclass(frozen=True)
class Pack:
    """Sequences end to end.

    Attributes:
        tokens: int64 (num_tokens,), cls and eos of each sequence included.
        lengths: int64 (num_sequences,), tokens in each sequence; on the host.
    """

    tokens: torch.Tensor
    lengths: np.ndarray

    @classmethod
    def from_tokens(cls, tokens: np.ndarray, lengths: np.ndarray, device: torch.device) -> Pack:
        """Move a pack's tokens (any integer type) to the device."""
        return cls(torch.from_numpy(tokens.astype(np.int64)).to(device), lengths)

    def split(self, num_tokens: int) -> list[Pack]:
        """Cut into packs of consecutive sequences, each of at most `num_tokens` tokens or one sequence."""
        offsets = np.concatenate(([0], np.cumsum(self.lengths)))
        boundaries = plan_packs(offsets, num_tokens)
        return [
            Pack(self.tokens[offsets[first] : offsets[last]], self.lengths[first:last])
            for first, last in pairwise(boundaries.tolist())
        ]

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """Stretches of equal length: (first token, number of sequences, tokens in each).

        Sequences of a run are one dense (sequences, length) batch, so attention over a run needs
        neither padding nor a mask. Packs are sorted by length, so that runs are few.
        """
        edges = np.flatnonzero(np.diff(self.lengths)) + 1
        firsts = np.concatenate(([0], edges))
        counts = np.diff(np.concatenate((firsts, [len(self.lengths)])))
        starts = np.concatenate(([0], np.cumsum(self.lengths)))[firsts]
        lengths = self.lengths[firsts]
        return list(zip(starts.tolist(), counts.tolist(), lengths.tolist(), strict=True))

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 (num_tokens,): the place of each token in its sequence; cls is 0."""
        starts = np.cumsum(self.lengths) - self.lengths
        positions = np.arange(len(self.tokens)) - np.repeat(starts, self.lengths)
        return torch.from_numpy(positions).to(self.tokens.device)
