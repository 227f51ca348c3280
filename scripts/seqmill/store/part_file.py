"""One part file: finished packs, saved. Layout:

    packs             int64 (num_packs,)           the packs' numbers in the index
    pack_ends         int64 (num_packs,)           where each pack's rows end
    quarantined_ends  int64 (num_packs,)           where each pack's quarantined rows end
    pack_digests      uint8 (num_packs, 32)        SHA-256 of each pack's result, see `PackResult.digest`
    index_rows        int64 (num_rows,)            each row's unique sequence in the index
    embeddings        float32 (num_rows, hidden_dim)
    residue_ends      int64 (num_packs,)           where the vectors of each pack's residues end
    residues          float16 or float32 (num_residues, number of layers * hidden_dim); (0, 0) if they are not kept
    quarantined_rows  int64 (num_quarantined,)     sequences of these packs without a finite embedding

and as attributes the fingerprint and the device and kernels in words (`computed_by`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import h5py
import numpy as np

from seqmill.base.hdf5 import open_hdf5, read_attributes
from seqmill.errors import SeqmillError
from seqmill.spec.fingerprint import Fingerprint
from seqmill.store.index import Index, residue_counts

SMALL_DATASETS = (
    "packs",
    "pack_ends",
    "quarantined_ends",
    "residue_ends",
    "pack_digests",
    "index_rows",
    "quarantined_rows",
)

NO_RESIDUES = np.empty((0, 0), np.float16)


@dataclass(frozen=True)
class Rows:
    """A dataset of rows in a file, to be read without keeping the file open.

    Attributes:
        offset: where in the file it begins, in bytes.
        number, width: its shape.
        dtype: of its values.
    """

    offset: int
    number: int
    width: int
    dtype: np.dtype

    @classmethod
    def of(cls, dataset: h5py.Dataset, dtypes: tuple[str, ...]) -> Rows:
        """Return where a contiguous dataset of two dimensions is; raise a SeqmillError if it is not one."""
        if dataset.ndim != 2 or dataset.dtype not in dtypes or dataset.chunks is not None:
            raise SeqmillError(f"its {dataset.name.strip('/')} are {dataset.dtype} {dataset.shape}")
        return cls(dataset.id.get_offset() or 0, *dataset.shape, dataset.dtype)

    def read(self, path: Path, rows: slice) -> np.ndarray:
        """Return some of the rows; raise a SeqmillError if the file ends before."""
        count = (rows.stop - rows.start) * self.width
        with path.open("rb") as file:
            file.seek(self.offset + rows.start * self.width * self.dtype.itemsize)
            values = np.fromfile(file, self.dtype, count)
        if len(values) != count:
            raise SeqmillError("it is truncated")
        return values.reshape(rows.stop - rows.start, self.width)


@dataclass(frozen=True)
class PackResult:
    """What came of a pack.

    Attributes:
        pack: its number in the index.
        index_rows: int64 (n,), its sequences that have an embedding, ascending.
        embeddings: float32 (n, hidden_dim), finite.
        quarantined_rows: int64, its sequences that have none.
        residues: of the sequences with an embedding, end to end: see `readout.Vectors`.
    """

    pack: int
    index_rows: np.ndarray
    embeddings: np.ndarray
    quarantined_rows: np.ndarray
    residues: np.ndarray = field(default_factory=lambda: NO_RESIDUES)

    @property
    def nbytes(self) -> int:
        """Bytes of its vectors."""
        return self.embeddings.nbytes + self.residues.nbytes

    def digest(self) -> bytes:
        """Return the SHA-256 of all of it."""
        digest = hashlib.sha256(f"{self.pack} {self.embeddings.shape} {self.residues.shape}".encode())
        for array in (self.index_rows, self.embeddings, self.quarantined_rows, self.residues):
            digest.update(np.ascontiguousarray(array))
        return digest.digest()


class PackSource(Protocol):
    """A file that holds finished packs: a part, or a complete shard.

    Attributes:
        packs: int64, their numbers.
        computed_by: the devices and kernels in words, separated by "; ".
    """

    @property
    def path(self) -> Path: ...
    @property
    def packs(self) -> np.ndarray: ...
    @property
    def computed_by(self) -> str: ...

    def quarantined(self, place: int) -> np.ndarray:
        """Return the quarantined rows of the pack at `place`."""

    def result(self, place: int, index: Index) -> PackResult:
        """Read what came of the pack at `place`; raise a SeqmillError if its bytes are not those that were written."""


@dataclass(frozen=True)
class Part:
    """A part file. The vectors stay on disk and no file stays open: a shard may have thousands of parts.

    Attributes:
        embeddings, residues: where in the file they are.
        others: as in the module's description, in memory.
    """

    path: Path
    fingerprint: Fingerprint
    computed_by: str
    embeddings: Rows
    residues: Rows
    packs: np.ndarray
    pack_ends: np.ndarray
    quarantined_ends: np.ndarray
    residue_ends: np.ndarray
    pack_digests: np.ndarray
    index_rows: np.ndarray
    quarantined_rows: np.ndarray

    def quarantined(self, place: int) -> np.ndarray:
        """Return the quarantined rows of the part's pack at `place`."""
        return self.quarantined_rows[_span(self.quarantined_ends, place)]

    def result(self, place: int, index: Index) -> PackResult:
        """Read what came of the part's pack at `place`.

        Raises:
            SeqmillError: the bytes are not those that were written, or the rows not those of the pack.
            OSError: the file can't be read.
        """
        rows = _span(self.pack_ends, place)
        result = PackResult(
            int(self.packs[place]),
            self.index_rows[rows],
            self.embeddings.read(self.path, rows),
            self.quarantined(place),
            self.residues.read(self.path, _span(self.residue_ends, place)),
        )
        if result.digest() != self.pack_digests[place].tobytes():
            raise SeqmillError(f"the SHA-256 of pack {result.pack} is not the one noted in it")
        of_pack = np.arange(*index.pack_offsets[result.pack : result.pack + 2])
        if not np.array_equal(result.index_rows, of_pack[~np.isin(of_pack, result.quarantined_rows)]) or len(
            of_pack
        ) != len(result.index_rows) + len(result.quarantined_rows):
            raise SeqmillError(f"its rows are not those of pack {result.pack}")
        if self.fingerprint.per_residue and len(result.residues) != residue_counts(index, result.index_rows).sum():
            raise SeqmillError(f"its residues are not those of pack {result.pack}")
        return result


def _span(ends: np.ndarray, place: int) -> slice:
    return slice(int(ends[place - 1]) if place else 0, int(ends[place]))


def open_part(path: Path) -> Part:
    """Open a part file, without reading its embeddings.

    Raises:
        SeqmillError: truncated, damaged, or not a part.
    """
    with open_hdf5(path, "part file") as file:
        attributes = read_attributes(file)
        if missing := [name for name in (*SMALL_DATASETS, "embeddings", "residues") if name not in file]:
            raise SeqmillError(f"lacks {', '.join(missing)}")
        fingerprint = Fingerprint.from_attributes(attributes)
        residues = Rows.of(file["residues"], (fingerprint.per_residue or "float16",))
        embeddings = Rows.of(file["embeddings"], ("float32",))
        arrays = {name: file[name][:] for name in SMALL_DATASETS}
        if len({len(arrays[name]) for name in SMALL_DATASETS[:5]}) != 1:
            raise SeqmillError("its datasets are not equally long")
        num_rows = int(arrays["pack_ends"][-1])
        if not num_rows == len(arrays["index_rows"]) == embeddings.number:
            raise SeqmillError("it has not as many rows as its packs")
        if arrays["residue_ends"][-1] != residues.number:
            raise SeqmillError("it has not as many residues as its packs")
        computed_by = str(attributes.get("computed_by", ""))
        return Part(path, fingerprint, computed_by, embeddings, residues, **arrays)
