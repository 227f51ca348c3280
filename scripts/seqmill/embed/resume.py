"""Part files: finished packs, saved while a shard is computed, so that a crash loses a minute at most.

A part lies in the folder `parts` beside the shards. It serves every attempt of the same computation,
of whatever world size: what counts is its fingerprint and the numbers of its packs.
Layout of a part: `seqmill.store.part_file`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seqmill.errors import SeqmillError
from seqmill.spec.fingerprint import Fingerprint
from seqmill.spec.packing import packs_of_rank
from seqmill.store.index import Index, residue_offsets
from seqmill.store.layout import SHARD, status_path_of
from seqmill.store.part_file import NO_RESIDUES, PackResult, PackSource, Part, open_part
from seqmill.store.parts import may_hold, set_aside
from seqmill.store.shard_checks import verify_shard
from seqmill.store.shards import Shard
from seqmill.store.status import COMPLETE, read_status

log = logging.getLogger(__name__)


class Parts:
    """The packs that are done, by number, and the files that hold them."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._places: dict[int, tuple[PackSource, int]] = {}

    def add(self, part: PackSource, packs: set[int] | range, with_quarantined: bool = True) -> None:
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
        result, place = self._result_of(row)
        return result.embeddings[place]

    def residues(self, row: int) -> np.ndarray:
        """Return the vectors of its residues, (num_residues, number of layers * hidden_dim), where they are kept."""
        result, place = self._result_of(row)
        offsets = residue_offsets(self._index, result.index_rows)
        return result.residues[offsets[place] : offsets[place + 1]]

    def _result_of(self, row: int) -> tuple[PackResult, int]:
        pack = int(np.searchsorted(self._index.pack_offsets, row, side="right")) - 1
        (result,) = self.results([pack])
        return result, int(np.searchsorted(result.index_rows, row))

    def quarantined(self, packs: range) -> list[int]:
        """Return the quarantined rows of these packs."""
        places = (self._places[pack] for pack in packs)
        return [row for part, place in places for row in part.quarantined(place).tolist()]

    def computed_by(self, packs: range) -> list[str]:
        """Return the kinds of device and kernels that computed these packs; more than one may differ by rounding."""
        return sorted({kind for pack in packs for kind in self._places[pack][0].computed_by.split("; ")})

    def results(self, packs: range | list[int]) -> Iterator[PackResult]:
        """Yield what came of these packs, in order, each checked as it is read.

        Raises:
            SeqmillError: a file was damaged since it was written; a part has been set aside.
        """
        for pack in packs:
            part, place = self._places[pack]
            try:
                result = part.result(place, self._index)
            except SeqmillError as error:
                aside = f"it is now {set_aside(part.path).name}, and " if isinstance(part, Part) else ""
                raise SeqmillError(
                    f"{part.path}: damaged since it was written: {error}; {aside}running again computes its packs anew"
                ) from None
            yield result


def find_parts(folder: Path, index: Index, fingerprint: Fingerprint, packs: range, with_quarantined: bool) -> Parts:
    """Return the sound parts of this computation that hold any of `packs`; see `Parts`.

    Those that can't hold any, by their names, are not opened: of other shards under way there may be thousands. A
    damaged part is set aside and its packs count as not done; a part of another computation is left where it is and
    the log says why it is not used.

    Raises:
        OSError: a part can't be read, which says nothing of what is in it.
    """
    found = Parts(index)
    refused: dict[str, int] = {}
    for path in sorted(path for path in folder.glob("*.part.h5") if may_hold(path, packs)):
        try:
            part = open_part(path)
            if difference := part.fingerprint.difference(fingerprint):
                refused[difference] = refused.get(difference, 0) + 1
                continue
            held = part.packs.tolist()
            if not all(0 <= pack < index.num_packs for pack in held):
                raise SeqmillError("it has packs that the index has not")
            for place, pack in enumerate(held):
                if pack in packs:
                    part.result(place, index)
        except (SeqmillError, ValueError, KeyError, IndexError, RuntimeError, TypeError) as error:
            if not path.exists():  # a sister shard is complete and has removed it
                continue
            path.read_bytes()  # raises if the trouble is with reading, as with a lack of file handles
            log.warning("%s is damaged (%s): set aside as %s", path, error, set_aside(path).name)
            continue
        except FileNotFoundError:
            continue
        found.add(part, packs, with_quarantined)
    for difference, number in refused.items():
        log.warning("%d part files in %s are of another computation and not used: %s", number, folder, difference)
    return found


@dataclass(frozen=True)
class FinishedShard:
    """Packs of a verified shard, to be read as those of a part are: see `part_file.PackSource`.

    The shard is mapped into memory: it stays readable when it is removed or replaced meanwhile.

    Attributes:
        packs: int64, those that are wanted of it.
        digests: of what came of each, as it was when the shard was verified.
        quarantined_rows: of each.
    """

    shard: Shard
    packs: np.ndarray
    digests: list[bytes]
    quarantined_rows: list[np.ndarray]

    @classmethod
    def of(cls, shard: Shard, packs: list[int], index: Index) -> FinishedShard:
        """Take these packs of a shard that has just been verified."""
        results = (_result(shard, pack, index) for pack in packs)  # one at a time in memory
        noted = [(result.digest(), result.quarantined_rows) for result in results]
        return cls(shard, np.array(packs, np.int64), [digest for digest, _ in noted], [rows for _, rows in noted])

    @property
    def path(self) -> Path:
        return self.shard.path

    @property
    def computed_by(self) -> str:
        """Of all packs of the shard, which does not say which was computed by which."""
        return "; ".join(self.shard.computed_by)

    def quarantined(self, place: int) -> np.ndarray:
        return self.quarantined_rows[place]

    def result(self, place: int, index: Index) -> PackResult:
        """Read what came of the pack at `place`; raise a SeqmillError if it is not what was verified."""
        result = _result(self.shard, int(self.packs[place]), index)
        if result.digest() != self.digests[place]:
            raise SeqmillError(f"the SHA-256 of pack {result.pack} has changed")
        return result


def _result(shard: Shard, pack: int, index: Index) -> PackResult:
    bounds = index.pack_offsets[pack : pack + 2]
    begin, end = np.searchsorted(shard.index_rows, bounds).tolist()
    quarantined = np.asarray(shard.quarantined_rows)
    residues = NO_RESIDUES
    if shard.fingerprint.per_residue:
        residues = np.asarray(shard.residues[shard.residue_offsets[begin] : shard.residue_offsets[end]])
    return PackResult(
        pack,
        np.array(shard.index_rows[begin:end]),
        np.asarray(shard.embeddings[begin:end]),
        quarantined[(quarantined >= bounds[0]) & (quarantined < bounds[1])],
        residues,
    )


def add_finished_shards(
    parts: Parts, folder: Path, index: Index, fingerprint: Fingerprint, packs: range, with_quarantined: bool
) -> None:
    """Add to `parts` those of `packs` that they lack and that complete shards of this computation in `folder` hold.

    A shard is read once, and only if it has such packs, to see whether it is sound. One that is not is left where it
    is, and the log says why it is not used; so is one of another computation.
    """
    refused: dict[str, int] = {}
    missing = {pack for pack in packs if pack not in parts}
    for path in sorted(folder.glob("shard_*-of-*.h5")):
        name = SHARD.fullmatch(path.name)
        if not name or missing.isdisjoint(packs_of_rank(index.num_packs, int(name["rank"]), int(name["world_size"]))):
            continue  # as each that is of as many shards as this worker's
        try:
            before = path.stat()
            status = read_status(status_path_of(path))
            if status.status != COMPLETE:
                continue
            if difference := Fingerprint.from_attributes(status.fingerprint).difference(fingerprint):
                refused[difference] = refused.get(difference, 0) + 1
                continue
            shard, _ = verify_shard(index, path, status_path_of(path), status.world_size)
            held = packs_of_rank(index.num_packs, shard.rank, shard.world_size)
            found = FinishedShard.of(shard, sorted(missing.intersection(held)), index)
            if not os.path.samestat(before, path.stat()):
                continue  # its own worker has replaced it: what is mapped may not be what was verified
        except (SeqmillError, OSError) as error:
            if path.exists():  # else it has been removed meanwhile, as by Snakemake before it is computed again
                log.warning("not used: %s", error)
            continue
        parts.add(found, missing, with_quarantined)
        taken = {pack for pack in found.packs.tolist() if pack in parts}
        missing -= taken
        log.info("%s is complete: %d packs are taken from it", path, len(taken))
    for difference, number in refused.items():
        log.warning("%d shards in %s are of another computation and not used: %s", number, folder, difference)
