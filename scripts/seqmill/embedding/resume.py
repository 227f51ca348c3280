"""Resuming: the packs that are done, in part files or in complete shards of another world size."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from seqmill.errors import SeqmillError
from seqmill.spec.fingerprint import Fingerprint
from seqmill.spec.packing import packs_of_rank
from seqmill.store.index import Index, residue_offsets
from seqmill.store.layout import SHARD, status_path_of
from seqmill.store.part_file import NO_RESIDUES, PackResult, Part
from seqmill.store.parts import PartStore, log_refused, set_aside
from seqmill.store.shard_checks import verify_shard
from seqmill.store.shards import Shard
from seqmill.store.status import COMPLETE, read_status

log = logging.getLogger(__name__)


class DonePacks:
    """The packs that are done, by number, and the files that hold them."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._places: dict[int, tuple[Part | FinishedShard, int]] = {}

    def add(self, source: "Part | FinishedShard", packs: set[int] | range, with_quarantined: bool = True) -> None:
        """Register the packs of a file that are among `packs`, preferring unquarantined ones.

        Without `with_quarantined`, packs with quarantined sequences count as not done: another attempt, perhaps on
        another GPU, may do better.
        """
        for place, pack in enumerate(source.packs.tolist()):
            clean = not len(source.quarantined(place))
            if pack in packs and (clean or (with_quarantined and pack not in self._places)):
                self._places[pack] = source, place

    def __contains__(self, pack: int) -> bool:
        return pack in self._places

    def __len__(self) -> int:
        return len(self._places)

    def embedding(self, row: int) -> np.ndarray:
        """Return the embedding of a sequence that is not quarantined, float32 (number of outputs * hidden_dim,)."""
        result, place = self._result_of(row)
        return result.embeddings[place]

    def residues(self, row: int) -> np.ndarray:
        """Return the vectors of a sequence's residues, (num_residues, number of layers * hidden_dim)."""
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
        return [row for source, place in places for row in source.quarantined(place).tolist()]

    def computed_by(self, packs: range) -> list[str]:
        """Return the devices and kernels that computed these packs; several may differ by rounding."""
        return sorted({kind for pack in packs for kind in self._places[pack][0].computed_by.split("; ")})

    def results(self, packs: range | list[int]) -> Iterator[PackResult]:
        """Yield the results of these packs, in order, each checked as it is read.

        Raise a SeqmillError if a file was damaged after it was written; a damaged part is set aside.
        """
        for pack in packs:
            source, place = self._places[pack]
            try:
                result = source.result(place, self._index)
            except SeqmillError as error:
                aside = f"; it is now {set_aside(source.path).name}" if isinstance(source, Part) else ""
                raise SeqmillError(
                    f"{source.path}: damaged since it was written: {error}{aside}; run again to compute its packs"
                ) from None
            yield result


def find_parts(store: PartStore, packs: range, with_quarantined: bool) -> DonePacks:
    """Return those of `packs` that sound parts hold; see `PartStore.find` and `DonePacks.add`."""
    done = DonePacks(store.index)
    for part in store.find(packs):
        done.add(part, packs, with_quarantined)
    return done


class FinishedShard:
    """Packs of a shard that has just been verified, which are read like those of a `Part`.

    The shard is mapped into memory: it stays readable when it is removed or replaced.
    """

    def __init__(self, shard: Shard, packs: list[int], index: Index) -> None:
        self._shard = shard
        self.path, self.computed_by = shard.path, "; ".join(shard.computed_by)  # the shard does not record it by pack
        self.packs = np.array(packs, np.int64)
        results = (_result(shard, pack, index) for pack in packs)  # one at a time in memory
        self._noted = [(result.digest(), result.quarantined_rows) for result in results]

    def quarantined(self, place: int) -> np.ndarray:
        return self._noted[place][1]

    def result(self, place: int, index: Index) -> PackResult:
        """Read the result of the pack at `place`; raise a SeqmillError if it is not the one that was verified."""
        result = _result(self._shard, int(self.packs[place]), index)
        if result.digest() != self._noted[place][0]:
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


def add_finished_shards(done: DonePacks, store: PartStore, folder: Path, packs: range, with_quarantined: bool) -> None:
    """Add those of `packs` that are missing from `done` and that complete shards of this computation in `folder` hold.

    Only a shard with such packs is read; it is verified first. A damaged shard, or one of another computation, stays,
    and the log tells why it is not used.
    """
    index, refused = store.index, Counter[str]()
    missing = {pack for pack in packs if pack not in done}
    for path in sorted(folder.glob("shard_*-of-*.h5")):
        name = SHARD.fullmatch(path.name)
        if not name or missing.isdisjoint(packs_of_rank(index.num_packs, int(name["rank"]), int(name["world_size"]))):
            continue  # always the case for the sibling shards
        try:
            before = path.stat()
            status = read_status(status_path_of(path))
            if status.status != COMPLETE:
                continue
            if difference := Fingerprint.from_attributes(status.fingerprint).difference(store.fingerprint):
                refused[difference] += 1
                continue
            shard, _ = verify_shard(index, path, status_path_of(path), status.world_size)
            held = packs_of_rank(index.num_packs, shard.rank, shard.world_size)
            found = FinishedShard(shard, sorted(missing.intersection(held)), index)
            if not os.path.samestat(before, path.stat()):
                continue  # its own worker has replaced it: the mapped file may not be the verified one
        except (SeqmillError, OSError) as error:
            if path.exists():  # else it was removed in the meantime, for example by Snakemake
                log.warning("not used: %s", error)
            continue
        done.add(found, missing, with_quarantined)
        taken = {pack for pack in found.packs.tolist() if pack in done}
        missing -= taken
        log.info("%s is complete: %d packs are taken from it", path, len(taken))
    log_refused(refused, "shards", folder)
