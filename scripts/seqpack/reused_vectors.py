"""The vectors that an index takes from earlier results: checked, then gathered as the merge asks for them."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from seqpack.errors import SeqpackError
from seqpack.fingerprint import Fingerprint
from seqpack.hdf5 import sha256_but_for
from seqpack.index import Index
from seqpack.reuse import BLOCK_ROWS, Source, open_source, require_computation, require_dtype

log = logging.getLogger(__name__)


class ReusedVectors:
    """The vectors of the index's reused sequences.

    Args:
        index: says which, and in which files.
        fingerprint: of the computation that they are combined with.
        dtype: of the result.

    Raises:
        SeqpackError: a file is gone, is another than when the index was built, is damaged, of another computation,
            or rounded to less than `dtype`.
    """

    def __init__(self, index: Index, fingerprint: Fingerprint, dtype: str) -> None:
        require_computation(index, fingerprint)
        self._index = index
        self._sources: list[Source] = []
        for number, note in enumerate(index.reuse):
            try:
                source = _open_noted(note)
                require_dtype(source, dtype)
                rows = np.flatnonzero(index.reused_files == number)
                _require_digests(index, source, rows)
                if len(rows):
                    _require_values(source)
            except SeqpackError as error:
                raise SeqpackError(
                    f"{error}; {index.path} takes vectors from it: bring the file back as it was, or remove the index "
                    "and run again without it in reuse"
                ) from None
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
        """Return path and fingerprint of each file, and how many sequences' vectors are taken from it."""
        return [
            {"path": path, "fingerprint": source.fingerprint.digest, "sequences": count}
            for path, source, count in zip(self._index.reused_paths, self._sources, self._counts, strict=True)
        ]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of reused sequences, float32 (n, outputs x hidden_dim).

        Args:
            rows: int64 (n,), of the index.

        Raises:
            SeqpackError: a value is not finite.
        """
        places = rows - self._index.num_computed
        numbers, source_rows = self._index.reused_files[places], self._index.reused_rows[places]
        widths = [output.shape[1] for output in self._sources[0].outputs]
        vectors = np.empty((len(rows), sum(widths)), np.float32)
        for number in np.unique(numbers):
            wanted = numbers == number
            outputs = self._sources[number].outputs
            vectors[wanted] = np.concatenate([output[source_rows[wanted]] for output in outputs], axis=1)
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            place = int(np.flatnonzero(~finite)[0])
            raise SeqpackError(
                f"{self._sources[numbers[place]].path}: the vector of {self._index.sequence_name(int(rows[place]))} is "
                "not finite: take the file out of reuse, and remove the index"
            )
        return vectors


def _open_noted(note: dict[str, Any]) -> Source:
    """Open a file that the index names, once it is known to be the same as when the index was built."""
    path = Path(note["path"])
    source = open_source(path)
    found = {"fingerprint": source.fingerprint.digest, "rows": len(source.digests), "bytes": path.stat().st_size}
    for name, value in found.items():
        if value != note[name]:
            raise SeqpackError(f"{path}: has {name} {value}, and had {note[name]} when the index was built")
    return source


def _require_digests(index: Index, source: Source, places: np.ndarray) -> None:
    """Raise a SeqpackError if a row of the file is not of the sequence that it is taken for."""
    for start in range(0, len(places), BLOCK_ROWS):
        block = places[start : start + BLOCK_ROWS]
        wanted = index.sequence_digests[index.num_computed + block]
        rows = index.reused_rows[block]
        if rows.max() >= len(source.digests) or (source.digests[rows] != wanted).any():
            raise SeqpackError(f"{source.path}: its sequences are not those that it had when the index was built")


def _require_values(source: Source) -> None:
    """Hold the file against the manifest beside it; warn if there is none of the same result."""
    path = source.path.with_name("manifest.json")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        (said,) = (output for output in manifest["outputs"].values() if "embeddings_sha256" in output)
        digests = said["embeddings_sha256"], said["rest_sha256"]
        offset, size = int(said["data_offset"]), int(said["data_bytes"])
        fingerprint = manifest["fingerprint"]["fingerprint"]
    except FileNotFoundError:
        log.warning("%s: no manifest.json beside it: its values can't be checked", source.path)
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s: can't be read, so that the values of %s can't be checked: %s", path, source.path, error)
        return
    if fingerprint != source.fingerprint.digest:
        log.warning("%s: of another result: the values of %s can't be checked", path, source.path)
        return
    first = source.outputs[0]
    if (offset, size) != (first.offset, first.nbytes) or digests != (  # type: ignore[attr-defined]
        hashlib.sha256(first).hexdigest(),
        sha256_but_for(source.path, offset, size),
    ):
        raise SeqpackError(f"{source.path}: is damaged: its bytes are not those that {path} tells of")
