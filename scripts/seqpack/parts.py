"""Part files: finished packs, saved while a shard is computed, so that a crash loses a minute at most.

A part lies in the folder `parts` beside the shards. It serves every attempt of the same computation,
of whatever world size: what counts is its fingerprint and the numbers of its packs. Layout:

    packs             int64 (num_packs,)          the packs' numbers in the index
    pack_ends         int64 (num_packs,)          where each pack's rows end
    index_rows        int64 (num_rows,)           each row's unique sequence in the index
    embeddings        float32 (num_rows, hidden_dim)
    quarantined_rows  int64 (num_quarantined,)    sequences of these packs without a finite embedding

and as attributes the fingerprint, the device and kernels in words (`computed_by`), and the SHA-256 of
the datasets' bytes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seqpack.errors import SeqpackError
from seqpack.fingerprint import Fingerprint
from seqpack.hdf5 import map_dataset, open_hdf5, read_attributes
from seqpack.index import Index

DATASETS = ("packs", "pack_ends", "index_rows", "embeddings", "quarantined_rows")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackResult:
    """What came of a pack.

    Attributes:
        pack: its number in the index.
        index_rows: int64 (n,), its sequences that have an embedding, ascending.
        embeddings: float32 (n, hidden_dim), finite.
        quarantined_rows: int64, its sequences that have none.
    """

    pack: int
    index_rows: np.ndarray
    embeddings: np.ndarray
    quarantined_rows: np.ndarray


@dataclass(frozen=True)
class Part:
    """An open part file. Arrays are memory maps, shaped as in the module's description."""

    path: Path
    fingerprint: Fingerprint
    computed_by: str
    sha256: str
    packs: np.ndarray
    pack_ends: np.ndarray
    index_rows: np.ndarray
    embeddings: np.ndarray
    quarantined_rows: np.ndarray

    def require_sound(self, index: Index) -> None:
        """Raise a SeqpackError unless the bytes are those written and the rows those of the packs."""
        if checksum(*(getattr(self, name) for name in DATASETS)) != self.sha256:
            raise SeqpackError("its SHA-256 is not the one noted in it")
        results = [self.result(place, index) for place in range(len(self.packs))]
        rows = [np.arange(*index.pack_offsets[result.pack : result.pack + 2]) for result in results]
        if not (
            all(
                np.array_equal(result.index_rows, of_pack[~np.isin(of_pack, result.quarantined_rows)])
                for result, of_pack in zip(results, rows, strict=True)
            )
            and sum(len(result.index_rows) for result in results) == len(self.index_rows) == len(self.embeddings)
            and sum(len(result.quarantined_rows) for result in results) == len(self.quarantined_rows)
            and self.embeddings.dtype == np.float32
        ):
            raise SeqpackError("its rows are not those of its packs")

    def result(self, place: int, index: Index) -> PackResult:
        """Return what came of the part's pack at `place`."""
        pack = int(self.packs[place])
        rows = slice(int(self.pack_ends[place - 1]) if place else 0, int(self.pack_ends[place]))
        first, last = index.pack_offsets[pack : pack + 2]
        quarantined = self.quarantined_rows
        mine = quarantined[(quarantined >= first) & (quarantined < last)]
        return PackResult(pack, self.index_rows[rows], self.embeddings[rows], mine)


class Parts:
    """The packs that are done, by number, and the part files that hold them."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._places: dict[int, tuple[Part, int]] = {}
        self._clean: set[int] = set()

    def add(self, part: Part, with_quarantined: bool = True) -> None:
        """Take the part's packs; of packs with quarantined sequences only those that nothing better is known of.

        Without `with_quarantined` such packs count as not done: another attempt, perhaps on another GPU,
        may do better.
        """
        for place, pack in enumerate(part.packs.tolist()):
            clean = not len(part.result(place, self._index).quarantined_rows)
            if clean or (with_quarantined and pack not in self._clean):
                self._places[pack] = part, place
            if clean:
                self._clean.add(pack)

    def __contains__(self, pack: int) -> bool:
        return pack in self._places

    def __len__(self) -> int:
        return len(self._places)

    def embedding(self, row: int) -> np.ndarray:
        """Return the embedding of one sequence that is not quarantined, float32 (hidden_dim,)."""
        pack = int(np.searchsorted(self._index.pack_offsets, row, side="right")) - 1
        part, place = self._places[pack]
        result = part.result(place, self._index)
        return np.array(result.embeddings[np.searchsorted(result.index_rows, row)])

    def quarantined(self, packs: range) -> list[int]:
        """Return the quarantined rows of these packs."""
        places = (self._places[pack] for pack in packs)
        return [row for part, place in places for row in part.result(place, self._index).quarantined_rows.tolist()]

    def computed_by(self, packs: range) -> list[str]:
        """Return the kinds of device and kernels that computed these packs; more than one may differ by rounding."""
        return sorted({self._places[pack][0].computed_by for pack in packs})

    def results(self, packs: range) -> Iterator[PackResult]:
        """Yield what came of these packs, in order; each part is checked again before it is used.

        Raises:
            SeqpackError: a part was damaged since it was written; it has been set aside.
        """
        sound: set[Path] = set()
        for pack in packs:
            part, place = self._places[pack]
            if part.path not in sound:
                try:
                    part.require_sound(self._index)
                except SeqpackError as error:
                    aside = _set_aside(part.path)
                    raise SeqpackError(
                        f"{part.path}: damaged since it was written: {error}; it is now {aside.name}, "
                        "and running again computes its packs anew"
                    ) from None
                sound.add(part.path)
            yield part.result(place, self._index)


def parts_folder(shard: Path) -> Path:
    """Return where the parts of a shard lie; its sister shards share the folder."""
    return shard.parent / "parts"


def open_part(path: Path) -> Part:
    """Open a part file, without checking its bytes.

    Raises:
        SeqpackError: truncated, damaged, or not a part.
    """
    with open_hdf5(path, "part file") as file:
        attributes = read_attributes(file)
        if missing := [name for name in DATASETS if name not in file]:
            raise SeqpackError(f"lacks {', '.join(missing)}")
        fingerprint = Fingerprint.from_attributes(attributes)
        arrays = {name: map_dataset(path, file[name]) for name in DATASETS}
        computed_by, sha256 = (str(attributes.get(name, "")) for name in ("computed_by", "sha256"))
        return Part(path, fingerprint, computed_by, sha256, **arrays)


def find_parts(folder: Path, index: Index, fingerprint: Fingerprint, packs: range, with_quarantined: bool) -> Parts:
    """Return the sound parts of this computation that hold any of `packs`; see `Parts`.

    A damaged part is set aside and its packs count as not done; a part of another computation is left
    where it is and the log says why it is not used.
    """
    found = Parts(index)
    refused: dict[str, int] = {}
    wanted = set(packs)
    for path in sorted(folder.glob("*.part.h5")):
        try:
            part = open_part(path)
            if difference := part.fingerprint.difference(fingerprint):
                refused[difference] = refused.get(difference, 0) + 1
                continue
            held = part.packs.tolist()
            if wanted.isdisjoint(held) and all(0 <= pack < index.num_packs for pack in held):
                continue
            part.require_sound(index)
        except FileNotFoundError:  # a sister shard is complete and has removed it
            continue
        except (SeqpackError, OSError, ValueError, KeyError, IndexError, RuntimeError, TypeError) as error:
            if path.exists():
                log.warning("%s is damaged (%s): set aside as %s", path, error, _set_aside(path).name)
            continue
        found.add(part, with_quarantined)
    for difference, number in refused.items():
        log.warning("%d part files in %s are of another computation and not used: %s", number, folder, difference)
    return found


def remove_parts(folder: Path, fingerprint: Fingerprint, packs: range) -> None:
    """Remove the parts of a computation that hold none but these packs, and the folder if it is then empty."""
    done = set(packs)
    for path in folder.glob("*.part.h5"):
        try:
            part = open_part(path)
        except (SeqpackError, OSError):
            continue
        if not part.fingerprint.difference(fingerprint) and done.issuperset(part.packs.tolist()):
            path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def remove_set_aside(folder: Path) -> None:
    """Remove the damaged parts that were set aside; for when nothing depends on parts any more."""
    for path in folder.glob("*.part.h5.damaged"):
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path, name: str) -> None:
    """Remove what a killed worker of this shard has left of parts it was writing; its lock must be held."""
    for path in folder.glob(f".{name}_pack_*.tmp"):
        path.unlink(missing_ok=True)


def checksum(*arrays: np.ndarray) -> str:
    """Return the SHA-256 (hexadecimal) of arrays, their shapes and dtypes included."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _set_aside(path: Path) -> Path:
    return path.replace(path.with_name(path.name + ".damaged"))
