"""The vectors that an index takes from earlier results: checked, then gathered as the merge asks for them."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

import numpy as np

from seqpack.errors import SeqpackError
from seqpack.fingerprint import Fingerprint
from seqpack.hdf5 import sha256_but_for
from seqpack.index import Index
from seqpack.reuse import BLOCK_ROWS, TAKE_OUT, Source, bring_back, open_noted, require_computation, require_dtype

BLOCK_BYTES = 16 << 20

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
                source = open_noted(note)
                require_dtype(source, dtype)
                rows = np.flatnonzero(index.reused_files == number)
                _require_digests(index, source, rows)
                if len(rows):
                    _require_values(source)
            except SeqpackError as error:
                raise SeqpackError(f"{error}; {bring_back(index.path)}") from None
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
        """
        places = rows - self._index.num_computed
        numbers, source_rows = self._index.reused_files[places], self._index.reused_rows[places]
        widths = [output.shape[1] for output in self._sources[0].outputs]
        vectors = np.empty((len(rows), sum(widths)), np.float32)
        for number in np.unique(numbers):
            wanted = numbers == number
            outputs = self._sources[number].outputs
            vectors[wanted] = np.concatenate([output[source_rows[wanted]] for output in outputs], axis=1)
        return vectors


def require_values(sources: list[Source], reused_files: np.ndarray) -> None:
    """Read the files that vectors are to be taken from: before, not only after, the rest is computed.

    Args:
        sources: the files.
        reused_files: int32, which of them has a sequence; -1 if none (`seqpack.reuse.find_reused`).

    Raises:
        SeqpackError: a vector is not finite, or a file is damaged.
    """
    for number in np.unique(reused_files[reused_files >= 0]):
        try:
            _require_values(sources[number])
        except SeqpackError as error:
            raise SeqpackError(f"{error}; {TAKE_OUT}, or compute that result anew") from None


def _require_digests(index: Index, source: Source, places: np.ndarray) -> None:
    """Raise a SeqpackError if a row of the file is not of the sequence that it is taken for."""
    for start in range(0, len(places), BLOCK_ROWS):
        block = places[start : start + BLOCK_ROWS]
        wanted = index.sequence_digests[index.num_computed + block]
        rows = index.reused_rows[block]
        if rows.max() >= len(source.digests) or (source.digests[rows] != wanted).any():
            raise SeqpackError(f"{source.path}: its sequences are not those that it had when the index was built")


def _require_values(source: Source) -> None:
    """Raise a SeqpackError if a vector is not finite, or the bytes are not those that the manifest beside tells of.

    A warning says that they can't be checked where there is no manifest of the same result.
    """
    digest, *_ = [_digest_of_finite(source, values) for values in source.outputs]
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
        digest,
        sha256_but_for(source.path, offset, size),
    ):
        raise SeqpackError(f"{source.path}: is damaged: its bytes are not those that {path} tells of")


def _digest_of_finite(source: Source, values: np.ndarray) -> str:
    """Return the SHA-256 of an output's bytes, read once in blocks; raise a SeqpackError if one is not finite."""
    digest = hashlib.sha256()
    block_rows = max(BLOCK_BYTES // (values.itemsize * values.shape[1]), 1)
    for start in range(0, len(values), block_rows):
        block = values[start : start + block_rows]
        digest.update(block)  # type: ignore[arg-type]
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise SeqpackError(f"{source.path}: the vector in its row {row} is not finite")
    return digest.hexdigest()
