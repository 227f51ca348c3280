"""A part file: finished packs, saved. Layout:

    packs             int64 (num_packs,)           the packs' numbers in the index
    pack_ends         int64 (num_packs,)           where each pack's rows end
    quarantined_ends  int64 (num_packs,)           where each pack's quarantined rows end
    pack_digests      uint8 (num_packs, 32)        SHA-256 of each pack's result, see `PackResult.digest`
    index_rows        int64 (num_rows,)            each row's unique sequence in the index
    embeddings        float32 (num_rows, hidden_dim)
    residue_ends      int64 (num_packs,)           where the vectors of each pack's residues end
    residues          float16 or float32 (num_residues, number of layers * hidden_dim); (0, 0) if they are not kept
    quarantined_rows  int64 (num_quarantined,)     sequences of these packs without a finite embedding

The attributes are the fingerprint, and the device and kernels in words (`computed_by`).
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from seqmill.base.files import name_errors, whole_or_absent
from seqmill.base.hdf5 import DAMAGE, new_hdf5, open_hdf5, read_attributes, write_attributes
from seqmill.errors import SeqmillError
from seqmill.spec.fingerprint import Fingerprint
from seqmill.store.index import Index, residue_counts

OF_PACKS = ("packs", "pack_ends", "quarantined_ends", "residue_ends", "pack_digests")
SMALL_DATASETS = (*OF_PACKS, "index_rows", "quarantined_rows")

NO_RESIDUES = np.empty((0, 0), np.float16)


@dataclass(frozen=True)
class PackResult:
    """The result of a pack."""

    pack: int  # its number in the index
    index_rows: np.ndarray  # int64 (n,), its sequences that have an embedding, ascending
    embeddings: np.ndarray  # float32 (n, hidden_dim), finite
    quarantined_rows: np.ndarray  # int64, its sequences without a finite embedding
    # Vectors of the residues of `index_rows`, end to end; (0, 0) if they are not kept.
    residues: np.ndarray = field(default_factory=lambda: NO_RESIDUES)

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors."""
        return self.embeddings.nbytes + self.residues.nbytes

    def digest(self) -> bytes:
        """Return the SHA-256 of everything in it."""
        digest = hashlib.sha256(f"{self.pack} {self.embeddings.shape} {self.residues.shape}".encode())
        for array in (self.index_rows, self.embeddings, self.quarantined_rows, self.residues):
            digest.update(np.ascontiguousarray(array))
        return digest.digest()


@dataclass(frozen=True)
class Part:
    """A part file, whose layout is above. Vectors stay on disk; no file stays open, as there may be thousands."""

    path: Path
    fingerprint: Fingerprint
    computed_by: str
    packs: np.ndarray
    pack_ends: np.ndarray
    quarantined_ends: np.ndarray
    residue_ends: np.ndarray
    pack_digests: np.ndarray
    index_rows: np.ndarray
    quarantined_rows: np.ndarray

    def quarantined(self, place: int) -> np.ndarray:
        return self.quarantined_rows[_span(self.quarantined_ends, place)]

    def result(self, place: int, index: Index) -> PackResult:
        """Read the result of the pack at `place`.

        Raise a SeqmillError if the file is damaged, or its rows are not those of the pack. An OSError or MemoryError
        means that it can't be read, not that it is damaged.
        """
        rows = _span(self.pack_ends, place)
        try:
            with name_errors(self.path), self.path.open("rb") as raw, h5py.File(raw, "r") as file:
                embeddings, residues = file["embeddings"][rows], file["residues"][_span(self.residue_ends, place)]
        except DAMAGE as error:
            if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
                raise
            raise SeqmillError(f"not a readable part file: {error}") from error
        pack, quarantined = int(self.packs[place]), self.quarantined(place)
        result = PackResult(pack, self.index_rows[rows], embeddings, quarantined, residues)
        if result.digest() != self.pack_digests[place].tobytes():
            raise SeqmillError(f"the SHA-256 of pack {pack} is not the one noted in it")
        of_pack = np.arange(*index.pack_offsets[pack : pack + 2])
        kept = of_pack[~np.isin(of_pack, quarantined)]
        if not np.array_equal(result.index_rows, kept) or len(of_pack) != len(kept) + len(quarantined):
            raise SeqmillError(f"its rows are not those of pack {pack}")
        if self.fingerprint.per_residue and len(residues) != residue_counts(index, result.index_rows).sum():
            raise SeqmillError(f"its residues are not those of pack {pack}")
        return result


def _span(ends: np.ndarray, place: int) -> slice:
    return slice(int(ends[place - 1]) if place else 0, int(ends[place]))


def write_part(path: Path, results: list[PackResult], fingerprint: Fingerprint, computed_by: str) -> None:
    """Write finished packs to a part file, whole or not at all."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(result, name) for result in results])

    def ends(name: str) -> np.ndarray:
        return np.cumsum([len(getattr(result, name)) for result in results], dtype=np.int64)

    with whole_or_absent(path) as temporary, new_hdf5(temporary) as file:
        write_attributes(file, {**fingerprint.attributes(), "computed_by": computed_by})
        for name, array in {
            "packs": np.array([result.pack for result in results], np.int64),
            "pack_ends": ends("index_rows"),
            "quarantined_ends": ends("quarantined_rows"),
            "residue_ends": ends("residues"),
            "pack_digests": np.array([list(result.digest()) for result in results], np.uint8),
            **{name: joined(name) for name in ("index_rows", "embeddings", "residues", "quarantined_rows")},
        }.items():
            file.create_dataset(name, data=array, track_times=False)


def open_part(path: Path) -> Part:
    """Open a part, without reading its embeddings; raise a SeqmillError if it is truncated, damaged, or not a part."""
    with open_hdf5(path, "part file") as file:
        attributes = read_attributes(file)
        if missing := [name for name in (*SMALL_DATASETS, "embeddings", "residues") if name not in file]:
            raise SeqmillError(f"lacks {', '.join(missing)}")
        fingerprint = Fingerprint.from_attributes(attributes)
        arrays = {name: file[name][:] for name in SMALL_DATASETS}
        if len({len(arrays[name]) for name in OF_PACKS}) != 1:
            raise SeqmillError("its datasets are not equally long")
        for name, dtype, number in (
            ("embeddings", "float32", int(arrays["pack_ends"][-1])),
            ("residues", fingerprint.per_residue or "float16", int(arrays["residue_ends"][-1])),
        ):
            if file[name].ndim != 2 or file[name].dtype != dtype:
                raise SeqmillError(f"its {name} are {file[name].dtype} {file[name].shape}")
            if len(file[name]) != number:
                raise SeqmillError(f"it does not have as many {name} as its packs")
        if len(arrays["index_rows"]) != len(file["embeddings"]):
            raise SeqmillError("it does not have as many rows as its packs")
        return Part(path, fingerprint, str(attributes.get("computed_by", "")), **arrays)
