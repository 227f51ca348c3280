"""A pack as the model's input: the tokens of several segments end to end, without padding."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from seqmill.spec.packing import plan_packs


@dataclass(frozen=True)
class Windows:
    """How a pack's segments are windows of sequences, to be blended (`seqmill.embedding.embedder`)."""

    begins: np.ndarray  # int64 (num_sequences + 1,), each sequence's first segment, and the end
    stride: int  # residues from one window's start to the next


@dataclass(frozen=True)
class Pack:
    """Segments end to end: whole sequences or windows of long ones, each independent for the model."""

    tokens: torch.Tensor  # (num_tokens,), any integer dtype, including the special tokens of each segment
    cu_seqlens: torch.Tensor  # int32 (num_segments + 1,), where each begins, and the end; on the device of the tokens
    lengths: np.ndarray  # int64 (num_segments,), tokens in each segment; on the host
    first_segment: int = 0  # the first segment's number in the index, for messages
    windows: Windows | None = None  # set if the segments are to be blended into sequences

    @classmethod
    def from_tokens(cls, tokens: np.ndarray, lengths: np.ndarray, first_segment: int = 0) -> "Pack":
        """Make a pack on the CPU; copies the tokens."""
        return cls(torch.from_numpy(tokens.copy()), torch.from_numpy(boundaries(lengths)), lengths, first_segment)

    def split(self, num_tokens: int) -> list["Pack"]:
        """Cut into packs of consecutive segments, each with at most `num_tokens` tokens or one sequence.

        The windows of a sequence stay together.
        """
        offsets = boundaries(self.lengths).astype(np.int64)
        begins = self.windows.begins if self.windows else np.arange(len(offsets))
        pieces = []
        for first_sequence, last_sequence in pairwise(plan_packs(offsets[begins], num_tokens).tolist()):
            first, last = int(begins[first_sequence]), int(begins[last_sequence])
            begin, end = int(offsets[first]), int(offsets[last])
            windows = None
            if self.windows:
                windows = Windows(begins[first_sequence : last_sequence + 1] - first, self.windows.stride)
            pieces.append(
                Pack(
                    self.tokens[begin:end],
                    self.cu_seqlens[first : last + 1] - begin,
                    self.lengths[first:last],
                    self.first_segment + first,
                    windows,
                )
            )
        return pieces

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """Runs of segments of equal length: (first token, number of segments, tokens in each).

        A run is a dense (segments, length) batch, so attention over it needs neither padding nor a mask. Packs are
        sorted by length, so there are few runs.
        """
        firsts = np.flatnonzero(np.diff(self.lengths, prepend=-1))
        counts = np.diff(firsts, append=len(self.lengths))
        starts, lengths = boundaries(self.lengths)[firsts], self.lengths[firsts]
        return list(zip(starts.tolist(), counts.tolist(), lengths.tolist(), strict=True))

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 (num_tokens,): the position of each token in its segment, from 0 on."""
        starts = self.cu_seqlens[:-1].long()
        num_tokens = len(self.tokens)
        # output_size avoids waiting for the device to compute the sum.
        repeated = torch.repeat_interleave(starts, self.cu_seqlens.diff().long(), output_size=num_tokens)
        return torch.arange(num_tokens, device=self.tokens.device) - repeated


def boundaries(lengths: np.ndarray) -> np.ndarray:
    """Return where segments of these lengths begin, and the end: int32 (num_segments + 1,)."""
    result = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=result[1:])
    return result
