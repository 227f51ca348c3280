"""Random sequences in packs, without a file: lengths as of real proteins and contigs, planned as an index is."""

import numpy as np
from gpu_sizes import SIZES
from proteins import LOG_SPREAD, MEDIAN_LENGTH

from seqmill.spec.architectures import Architecture, DnabertArchitecture
from seqmill.spec.packing import plan_packs

CLS, EOS, FIRST, LAST = 0, 2, 4, 24  # ESM-2's tokens: the 20 amino acids from FIRST on


class Packs:
    """Sequences by descending length; has what the runner reads of a `seqmill.store.index.Index`."""

    is_blended, has_segments, stride = False, False, 0

    def __init__(self, lengths: np.ndarray, pack_tokens: int, tokens: np.ndarray) -> None:
        self.lengths, self._tokens = lengths, tokens
        self._begins = np.concatenate(([0], np.cumsum(lengths)))
        self._packs = plan_packs(self._begins, pack_tokens)
        self.num_packs, self.max_tokens = len(self._packs) - 1, int(lengths[0])

    def sequences(self) -> list[np.ndarray]:
        return np.split(self._tokens, self._begins[1:-1])

    def pack_lengths(self, pack: int) -> np.ndarray:
        return self.lengths[self._packs[pack] : self._packs[pack + 1]]

    def pack_tokens(self, pack: int) -> np.ndarray:
        first, last = self._packs[pack : pack + 2]
        return self._tokens[self._begins[first] : self._begins[last]]

    def first_segment(self, pack: int) -> int:
        return int(self._packs[pack])

    def pack_windows(self, pack: int) -> None:
        return None

    def pack_segments(self, pack: int) -> None:
        return None

    def evenly(self, count: int) -> list[int]:
        """Return pack numbers spread evenly, so that lengths are distributed as in the whole."""
        return np.unique(np.linspace(0, self.num_packs - 1, min(max(count, 4), self.num_packs)).astype(int)).tolist()


def random_packs(architecture: Architecture) -> Packs:
    """Return seeded proteins, or contigs of DNABERT-S, which have about 400 tokens (2,000 bases)."""
    generator = np.random.default_rng(1)
    if isinstance(architecture, DnabertArchitecture):
        lengths = generator.lognormal(np.log(400), 0.9, SIZES.contigs).clip(60, 2 * SIZES.longest)
        vocabulary, kind = (5, architecture.vocabulary), np.uint16
    else:
        lengths = generator.lognormal(np.log(MEDIAN_LENGTH), LOG_SPREAD, SIZES.proteins).clip(30, SIZES.longest)
        vocabulary, kind = (FIRST, LAST), np.uint8
    lengths = np.sort(lengths.astype(np.int64) + 2)[::-1].copy()
    tokens = generator.integers(*vocabulary, lengths.sum()).astype(kind)
    ends = np.cumsum(lengths)
    tokens[ends - 1], tokens[ends - lengths] = EOS, CLS
    return Packs(lengths, SIZES.pack_tokens, tokens)
