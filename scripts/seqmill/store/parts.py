"""The folder of parts, which all shards of a results folder share.

A part's name tells which worker wrote it and which packs it may hold, so most files need not be opened:
`shard_3-of-8.h5_pack_00000003-00000027-by-8.part.h5` comes from the worker of shard_3-of-8.h5. It holds packs 3 and 27
and otherwise only packs among 11 and 19. A file with another name may hold any pack.
"""

import glob
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import numpy as np

from seqmill.base.files import whole_or_absent
from seqmill.base.hdf5 import open_hdf5, read_attributes
from seqmill.base.locks import lock_holder
from seqmill.errors import SeqmillError
from seqmill.spec.fingerprint import Fingerprint
from seqmill.store.index import Index
from seqmill.store.layout import SHARD, parts_folder, shard_path_of, status_path_of
from seqmill.store.part_file import PackResult, Part, open_part, write_part
from seqmill.store.status import read_status

# The shard's name may have any form: it is the one that also names the shard's lock.
NAME = re.compile(
    r"(?P<shard>.+)_pack_(?P<first>\d{8,12})-(?P<last>\d{8,12})-by-(?P<step>[1-9]\d{0,11})(?:_\d+)?\.part\.h5"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartStore:
    """The parts of one computation; the folder may hold those of others as well. A part serves every world size."""

    folder: Path  # `parts`, in the folder of the shards
    index: Index
    fingerprint: Fingerprint

    def find(self, packs: range) -> Iterator[Part]:
        """Yield the sound parts that hold any of `packs`.

        A damaged part is set aside. A part of another computation stays, and the log tells why it is not used. An
        OSError means that a part can't be read, not that it is damaged.
        """
        refused: Counter[str] = Counter()
        for path in sorted(path for path in self.folder.glob("*.part.h5") if may_hold(path, packs)):
            try:
                part = open_part(path)
                if difference := part.fingerprint.difference(self.fingerprint):
                    refused[difference] += 1
                    continue
                self._verify(part, packs)
            except (SeqmillError, ValueError, KeyError, IndexError, RuntimeError, TypeError) as error:
                if path.exists():  # else the worker of a shard that is now complete has removed it
                    log.warning("%s is damaged (%s): set aside as %s", path, error, set_aside(path).name)
            except FileNotFoundError:
                continue
            else:
                yield part
        log_refused(refused, "part files", self.folder)

    def _verify(self, part: Part, packs: range) -> None:
        held = part.packs.tolist()
        if not all(0 <= pack < self.index.num_packs for pack in held):
            raise SeqmillError("it has packs that the index does not have")
        for place, pack in enumerate(held):
            if pack in packs:
                part.result(place, self.index)

    def save(self, shard_name: str, results: list[PackResult], computed_by: str) -> Part:
        """Write a new part for the worker of a shard; `computed_by` are device and kernels in words."""
        stem = part_stem(shard_name, [result.pack for result in results])
        names = chain([f"{stem}.part.h5"], (f"{stem}_{number}.part.h5" for number in count(2)))
        path = next(path for name in names if not (path := self.folder / name).exists())
        write_part(path, results, self.fingerprint, computed_by)
        return open_part(path)

    def remove(self, packs: range, own: str = "") -> None:
        """Remove the parts of this computation that hold only packs among `packs`.

        A part stays while the worker that wrote it is running; `own` is the file name of the caller's shard.
        """
        done = set(packs)
        for path in self.folder.glob("*.part.h5"):
            shard = shard_of(path)
            if not may_hold_only(path, packs) or (shard not in ("", own) and lock_holder(self.folder.parent / shard)):
                continue
            try:
                part = open_part(path)
            except (SeqmillError, OSError, IndexError):
                continue
            if not part.fingerprint.difference(self.fingerprint) and done.issuperset(part.packs.tolist()):
                path.unlink(missing_ok=True)

    def replace_by_shard(self, shard: Path, status: Path, packs: range) -> None:
        """Remove the parts of a complete shard; first link the shard and its status JSON into the folder.

        Snakemake deletes outputs that it takes for failed. The links keep the packs until the merge, for a later
        attempt of any world size. Only shards with a workflow's file names are linked. Raise an OSError if the file
        system has no hard links; the parts stay.
        """
        if SHARD.fullmatch(shard.name):
            self.folder.mkdir(exist_ok=True)
            for path, name in ((status, status_path_of(shard).name), (shard, shard.name)):
                with whole_or_absent(self.folder / name) as temporary:
                    os.link(path, temporary)
        self.remove(packs, own=shard.name)

    def clear(self) -> None:
        """Remove the parts and linked shards of this computation, which is merged now, and all damaged parts."""
        self.remove(range(self.index.num_packs))
        for path in self.folder.glob("*.part.h5.damaged"):
            path.unlink(missing_ok=True)
        # A status is linked before its shard and removed after it: a process killed in between leaves it alone.
        for status in self.folder.glob("shard_*-of-*.status.json"):
            with suppress(SeqmillError, OSError):
                if not Fingerprint.from_attributes(read_status(status).fingerprint).difference(self.fingerprint):
                    shard_path_of(status).unlink(missing_ok=True)
                    status.unlink()

    def bytes_on_disk(self, shards: Iterable[Path]) -> int:
        """Return the bytes of this computation in these shards and in all parts."""
        num_bytes = 0
        for path in (*shards, *self.folder.glob("*.part.h5")):
            # A damaged file does not count, nor one that another worker has removed.
            with suppress(SeqmillError, OSError), open_hdf5(path, "file") as file:
                if not Fingerprint.from_attributes(read_attributes(file)).difference(self.fingerprint):
                    num_bytes += path.stat().st_size
        return num_bytes


def log_refused(refused: Mapping[str, int], what: str, folder: Path) -> None:
    """Log how many files of other computations were found, by their differences."""
    for difference, number in refused.items():
        log.warning("%d %s in %s are of another computation and not used: %s", number, what, folder, difference)


def part_stem(shard_name: str, packs: list[int]) -> str:
    """Return the name of a part with these packs, without `.part.h5` and the number that makes it unique."""
    step = math.gcd(*np.diff(sorted(packs)).tolist()) or 1  # 0 for a single pack
    return f"{shard_name}_pack_{min(packs):08d}-{max(packs):08d}-by-{step}"


def shard_of(part: Path) -> str:
    """Return the file name of the shard for which a part, or its temporary file, was written; empty if unknown."""
    match = NAME.match(part.name.removeprefix("."))
    return match["shard"] if match else ""


def may_hold(part: Path, packs: range) -> bool:
    """Return whether a part may hold any of these packs, by its name."""
    if (named := _named_packs(part)) is None:
        return True
    fewer, more = sorted((named, packs), key=len)
    return any(pack in more for pack in fewer)


def may_hold_only(part: Path, packs: range) -> bool:
    """Return whether all packs of a part may be among these, by its name. It does hold its first and its last."""
    named = _named_packs(part)
    return named is None or (named[0] in packs and named[-1] in packs)


def _named_packs(part: Path) -> range | None:
    match = NAME.fullmatch(part.name)
    if not match or int(match["first"]) > int(match["last"]):
        return None
    return range(int(match["first"]), int(match["last"]) + 1, int(match["step"]))


def remove_unfinished(shard: Path) -> None:
    """Remove the temporary files that killed workers of a shard left on any machine; the shard's lock must be held."""
    parts = [path for path in parts_folder(shard).glob(".*.part.h5.*.tmp") if shard_of(path) == shard.name]
    for path in (*shard.parent.glob(f".{glob.escape(shard.name)}.*.tmp"), *parts):
        path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged part and return its new path."""
    path.read_bytes()  # an OSError does not mean that it is damaged: too many files may be open
    return path.replace(path.with_name(path.name + ".damaged"))
