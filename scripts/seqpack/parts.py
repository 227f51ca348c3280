"""Part files: finished packs, saved while a shard is computed, so that a crash loses a minute at most.

A part lies in the folder `parts` beside the shards. It serves every attempt of the same computation,
of whatever world size: what counts is its fingerprint and the numbers of its packs. Layout:

    packs             int64 (num_packs,)           the packs' numbers in the index
    pack_ends         int64 (num_packs,)           where each pack's rows end
    quarantined_ends  int64 (num_packs,)           where each pack's quarantined rows end
    pack_digests      uint8 (num_packs, 32)        SHA-256 of each pack's result, see `PackResult.digest`
    index_rows        int64 (num_rows,)            each row's unique sequence in the index
    embeddings        float32 (num_rows, hidden_dim)
    quarantined_rows  int64 (num_quarantined,)     sequences of these packs without a finite embedding

and as attributes the fingerprint and the device and kernels in words (`computed_by`).
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
from seqpack.hdf5 import open_hdf5, read_attributes
from seqpack.index import Index
from seqpack.shard_lock import lock_holder

SMALL_DATASETS = ("packs", "pack_ends", "quarantined_ends", "pack_digests", "index_rows", "quarantined_rows")

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

    def digest(self) -> bytes:
        """Return the SHA-256 of all of it."""
        digest = hashlib.sha256(f"{self.pack} {self.embeddings.shape}".encode())
        for array in (self.index_rows, self.embeddings, self.quarantined_rows):
            digest.update(np.ascontiguousarray(array))
        return digest.digest()


@dataclass(frozen=True)
class Part:
    """A part file. The embeddings stay on disk and no file stays open: a shard may have thousands of parts.

    Attributes:
        offset, hidden_dim: where in the file the embeddings begin, and their width.
        others: as in the module's description, in memory.
    """

    path: Path
    fingerprint: Fingerprint
    computed_by: str
    offset: int
    hidden_dim: int
    packs: np.ndarray
    pack_ends: np.ndarray
    quarantined_ends: np.ndarray
    pack_digests: np.ndarray
    index_rows: np.ndarray
    quarantined_rows: np.ndarray

    def quarantined(self, place: int) -> np.ndarray:
        """Return the quarantined rows of the part's pack at `place`."""
        return self.quarantined_rows[_span(self.quarantined_ends, place)]

    def result(self, place: int, index: Index) -> PackResult:
        """Read what came of the part's pack at `place`.

        Raises:
            SeqpackError: the bytes are not those that were written, or the rows not those of the pack.
            OSError: the file can't be read.
        """
        rows = _span(self.pack_ends, place)
        with self.path.open("rb") as file:
            file.seek(self.offset + rows.start * self.hidden_dim * 4)
            values = np.fromfile(file, np.float32, (rows.stop - rows.start) * self.hidden_dim)
        if len(values) != (rows.stop - rows.start) * self.hidden_dim:
            raise SeqpackError("it is truncated")
        embeddings = values.reshape(-1, self.hidden_dim)
        result = PackResult(int(self.packs[place]), self.index_rows[rows], embeddings, self.quarantined(place))
        if result.digest() != self.pack_digests[place].tobytes():
            raise SeqpackError(f"the SHA-256 of pack {result.pack} is not the one noted in it")
        of_pack = np.arange(*index.pack_offsets[result.pack : result.pack + 2])
        if not np.array_equal(result.index_rows, of_pack[~np.isin(of_pack, result.quarantined_rows)]) or len(
            of_pack
        ) != len(result.index_rows) + len(result.quarantined_rows):
            raise SeqpackError(f"its rows are not those of pack {result.pack}")
        return result


def _span(ends: np.ndarray, place: int) -> slice:
    return slice(int(ends[place - 1]) if place else 0, int(ends[place]))


class Parts:
    """The packs that are done, by number, and the part files that hold them."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._places: dict[int, tuple[Part, int]] = {}

    def add(self, part: Part, packs: set[int] | range, with_quarantined: bool = True) -> None:
        """Take those of the part's packs that are in `packs` and of which nothing better is known.

        Without `with_quarantined` packs with quarantined sequences count as not done: another attempt,
        perhaps on another GPU, may do better.
        """
        for place, pack in enumerate(part.packs.tolist()):
            clean = not len(part.quarantined(place))
            if pack in packs and (clean or (with_quarantined and pack not in self._places)):
                self._places[pack] = part, place

    def __contains__(self, pack: int) -> bool:
        return pack in self._places

    def __len__(self) -> int:
        return len(self._places)

    def embedding(self, row: int) -> np.ndarray:
        """Return the embedding of one sequence that is not quarantined, float32 (hidden_dim,)."""
        pack = int(np.searchsorted(self._index.pack_offsets, row, side="right")) - 1
        (result,) = self.results([pack])
        return result.embeddings[np.searchsorted(result.index_rows, row)]

    def quarantined(self, packs: range) -> list[int]:
        """Return the quarantined rows of these packs."""
        places = (self._places[pack] for pack in packs)
        return [row for part, place in places for row in part.quarantined(place).tolist()]

    def computed_by(self, packs: range) -> list[str]:
        """Return the kinds of device and kernels that computed these packs; more than one may differ by rounding."""
        return sorted({self._places[pack][0].computed_by for pack in packs})

    def results(self, packs: range | list[int]) -> Iterator[PackResult]:
        """Yield what came of these packs, in order, each checked as it is read.

        Raises:
            SeqpackError: a part was damaged since it was written; it has been set aside.
        """
        for pack in packs:
            part, place = self._places[pack]
            try:
                result = part.result(place, self._index)
            except SeqpackError as error:
                aside = _set_aside(part.path)
                raise SeqpackError(
                    f"{part.path}: damaged since it was written: {error}; it is now {aside.name}, "
                    "and running again computes its packs anew"
                ) from None
            yield result


def parts_folder(shard: Path) -> Path:
    """Return where the parts of a shard lie; its sister shards share the folder."""
    return shard.parent / "parts"


def open_part(path: Path) -> Part:
    """Open a part file, without reading its embeddings.

    Raises:
        SeqpackError: truncated, damaged, or not a part.
    """
    with open_hdf5(path, "part file") as file:
        attributes = read_attributes(file)
        if missing := [name for name in (*SMALL_DATASETS, "embeddings") if name not in file]:
            raise SeqpackError(f"lacks {', '.join(missing)}")
        fingerprint = Fingerprint.from_attributes(attributes)
        embeddings = file["embeddings"]
        if embeddings.ndim != 2 or embeddings.dtype != np.float32 or embeddings.chunks is not None:
            raise SeqpackError(f"its embeddings are {embeddings.dtype} {embeddings.shape}")
        arrays = {name: file[name][:] for name in SMALL_DATASETS}
        if len({len(arrays[name]) for name in SMALL_DATASETS[:4]}) != 1:
            raise SeqpackError("its datasets are not equally long")
        num_rows = int(arrays["pack_ends"][-1])
        if not num_rows == len(arrays["index_rows"]) == embeddings.shape[0]:
            raise SeqpackError("it has not as many rows as its packs")
        computed_by = str(attributes.get("computed_by", ""))
        offset = embeddings.id.get_offset() or 0
        return Part(path, fingerprint, computed_by, offset, embeddings.shape[1], **arrays)


def find_parts(folder: Path, index: Index, fingerprint: Fingerprint, packs: range, with_quarantined: bool) -> Parts:
    """Return the sound parts of this computation that hold any of `packs`; see `Parts`.

    A damaged part is set aside and its packs count as not done; a part of another computation is left
    where it is and the log says why it is not used.

    Raises:
        OSError: a part can't be read, which says nothing of what is in it.
    """
    found = Parts(index)
    refused: dict[str, int] = {}
    for path in sorted(folder.glob("*.part.h5")):
        try:
            part = open_part(path)
            if difference := part.fingerprint.difference(fingerprint):
                refused[difference] = refused.get(difference, 0) + 1
                continue
            held = part.packs.tolist()
            if not all(0 <= pack < index.num_packs for pack in held):
                raise SeqpackError("it has packs that the index has not")
            for place, pack in enumerate(held):
                if pack in packs:
                    part.result(place, index)
        except (SeqpackError, ValueError, KeyError, IndexError, RuntimeError, TypeError) as error:
            if not path.exists():  # a sister shard is complete and has removed it
                continue
            path.read_bytes()  # raises if the trouble is with reading, as with a lack of file handles
            log.warning("%s is damaged (%s): set aside as %s", path, error, _set_aside(path).name)
            continue
        except FileNotFoundError:
            continue
        found.add(part, packs, with_quarantined)
    for difference, number in refused.items():
        log.warning("%d part files in %s are of another computation and not used: %s", number, folder, difference)
    return found


def remove_parts(folder: Path, fingerprint: Fingerprint, packs: range, own: str = "") -> None:
    """Remove the parts of a computation that hold none but these packs.

    What a worker still builds on, of another number of shards, stays; `own` is the caller's `parts_name`.
    """
    done = set(packs)
    for path in folder.glob("*.part.h5"):
        name = path.name.partition("_pack_")[0]
        if name != own and lock_holder(folder.parent / f"{name.replace('rank', 'shard', 1)}.h5"):
            continue
        try:
            part = open_part(path)
        except (SeqpackError, OSError, IndexError):
            continue
        if not part.fingerprint.difference(fingerprint) and done.issuperset(part.packs.tolist()):
            path.unlink(missing_ok=True)


def remove_set_aside(folder: Path) -> None:
    """Remove the damaged parts that were set aside; for when nothing depends on parts any more."""
    for path in folder.glob("*.part.h5.damaged"):
        path.unlink(missing_ok=True)


def parts_name(rank: int, world_size: int) -> str:
    """Return what the names of a rank's parts begin with."""
    return f"rank_{rank}-of-{world_size}"


def remove_unfinished(shard: Path, name: str) -> None:
    """Remove what killed workers of a shard, on any machine, have left half-written; its lock must be held."""
    for path in (*shard.parent.glob(f".{shard.name}.*.tmp"), *parts_folder(shard).glob(f".{name}_pack_*.tmp")):
        path.unlink(missing_ok=True)


def _set_aside(path: Path) -> Path:
    return path.replace(path.with_name(path.name + ".damaged"))
