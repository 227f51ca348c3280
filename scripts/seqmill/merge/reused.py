"""The vectors that an index takes from earlier results: checked, then read as the merge needs them."""

from typing import Any

import numpy as np

from seqmill.errors import SeqmillError
from seqmill.spec.fingerprint import Fingerprint
from seqmill.store.index import Index
from seqmill.store.reuse import Source, bring_back, open_noted, require_computation, require_dtype


class ReusedVectors:
    """The vectors of the index's reused sequences, which are combined with the computation `fingerprint`.

    Raises a SeqmillError if a file is missing, has changed since the index was built, is damaged, is of another
    computation, or has a lower precision than the result's `dtype`.
    """

    def __init__(self, index: Index, fingerprint: Fingerprint, dtype: str) -> None:
        require_computation(index, fingerprint)
        self._index = index
        self._sources: list[Source] = []
        for number, note in enumerate(index.reuse):
            try:
                source = open_noted(note)
                require_dtype(source, dtype)
                rows = np.flatnonzero(index.reused_files == number)
                source.require_digests(index, rows)
                if len(rows):
                    source.require_values()
            except SeqmillError as error:
                raise SeqmillError(f"{error}; {bring_back(index.path)}") from None
            self._sources.append(source)
        self._counts = np.bincount(index.reused_files, minlength=len(self._sources)).tolist()

    @property
    def used(self) -> list[Source]:
        """The files that vectors are taken from."""
        return [source for source, count in zip(self._sources, self._counts, strict=True) if count]

    @property
    def computed_by(self) -> set[str]:
        """The kinds of device and kernels that computed the vectors."""
        return {kind for source in self.used for kind in source.attributes["computed_by"].split("; ") if kind}

    def summary(self) -> list[dict[str, Any]]:
        """Return the path and fingerprint of each file, and how many vectors are taken from it."""
        return [
            {"path": path, "fingerprint": source.fingerprint.digest, "sequences": count}
            for path, source, count in zip(self._index.reused_paths, self._sources, self._counts, strict=True)
        ]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of reused sequences (index rows, int64 (n,)) as float32 (n, outputs x hidden_dim)."""
        places = rows - self._index.num_computed
        numbers, source_rows = self._index.reused_files[places], self._index.reused_rows[places]
        vectors = np.empty((len(rows), sum(output.shape[1] for output in self._sources[0].outputs)), np.float32)
        for number in np.unique(numbers):
            wanted = numbers == number
            outputs = self._sources[number].outputs
            vectors[wanted] = np.concatenate([output[source_rows[wanted]] for output in outputs], axis=1)
        return vectors
