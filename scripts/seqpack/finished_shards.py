"""Complete shards, whose packs a worker takes as it takes those of parts: of another number of shards, or its own.

A shard's own: Snakemake deletes outputs that it takes for failed, as where a clock was set back. So a complete shard
keeps a second name, a hard link in the folder of the parts, until the merge is done.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seqpack.errors import SeqpackError
from seqpack.files import whole_or_absent
from seqpack.fingerprint import Fingerprint
from seqpack.index import Index
from seqpack.part_file import NO_RESIDUES, PackResult
from seqpack.parts import Parts, parts_folder
from seqpack.plan import packs_of_rank
from seqpack.shard import Shard
from seqpack.shard_names import SHARD
from seqpack.status import COMPLETE, read_status
from seqpack.verify import status_path_of, verify_shard

log = logging.getLogger(__name__)


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
        """Read what came of the pack at `place`; raise a SeqpackError if it is not what was verified."""
        result = _result(self.shard, int(self.packs[place]), index)
        if result.digest() != self.digests[place]:
            raise SeqpackError(f"the SHA-256 of pack {result.pack} has changed")
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
            shard = verify_shard(index, path, status_path_of(path), status.world_size).shard
            held = packs_of_rank(index.num_packs, shard.rank, shard.world_size)
            found = FinishedShard.of(shard, sorted(missing.intersection(held)), index)
            if not os.path.samestat(before, path.stat()):
                continue  # its own worker has replaced it: what is mapped may not be what was verified
        except (SeqpackError, OSError) as error:
            if path.exists():  # else it has been removed meanwhile, as by Snakemake before it is computed again
                log.warning("not used: %s", error)
            continue
        parts.add(found, missing, with_quarantined)
        taken = {pack for pack in found.packs.tolist() if pack in parts}
        missing -= taken
        log.info("%s is complete: %d packs are taken from it", path, len(taken))
    for difference, number in refused.items():
        log.warning("%d shards in %s are of another computation and not used: %s", number, folder, difference)


def keep_finished(shard: Path, status: Path) -> None:
    """Give a complete shard and its status JSON a second name in the folder of the parts, if it is a workflow's.

    Raises:
        OSError: the file system has no hard links.
    """
    if not SHARD.fullmatch(shard.name):
        return
    folder = parts_folder(shard)
    folder.mkdir(exist_ok=True)
    for path, name in ((status, status_path_of(shard).name), (shard, shard.name)):
        with whole_or_absent(folder / name) as temporary:
            os.link(path, temporary)


def remove_kept(folder: Path, fingerprint: Fingerprint) -> None:
    """Remove the second names of complete shards of a computation, once they are merged."""
    for path in folder.glob("shard_*-of-*.h5"):
        status = status_path_of(path)
        with suppress(SeqpackError, OSError):
            if not Fingerprint.from_attributes(read_status(status).fingerprint).difference(fingerprint):
                path.unlink()
                status.unlink()
