"""What the name of a part file says: whose it is, and which packs it may hold, without opening it.

`shard_3-of-8.h5_pack_00000003-00000027-by-8.part.h5` is of a worker that writes shard_3-of-8.h5, and holds packs 3
and 27 and none but 3, 11, 19 and 27. The whole name of the shard stands in it, which need not be of this form, as it
names the shard's lock as well. A file with another name may hold anything.
"""

from __future__ import annotations

import glob
import math
import os
import re
from contextlib import suppress
from pathlib import Path

import numpy as np

from seqmill.base.files import whole_or_absent
from seqmill.base.locks import lock_holder
from seqmill.errors import SeqmillError
from seqmill.spec.fingerprint import Fingerprint
from seqmill.store.layout import SHARD, parts_folder, status_path_of
from seqmill.store.part_file import open_part
from seqmill.store.status import read_status

NAME = re.compile(
    r"(?P<shard>.+)_pack_(?P<first>\d{8,12})-(?P<last>\d{8,12})-by-(?P<step>[1-9]\d{0,11})(?:_\d+)?\.part\.h5"
)


def part_stem(shard_name: str, packs: list[int]) -> str:
    """Return what the name of a part with these packs is, but for `.part.h5` and a number that makes it unique."""
    step = math.gcd(*np.diff(sorted(packs)).tolist()) or 1  # 0 of a single pack
    return f"{shard_name}_pack_{min(packs):08d}-{max(packs):08d}-by-{step}"


def shard_of(part: Path) -> str:
    """Return the name of the shard whose worker writes or wrote a part; empty if the part's name does not say."""
    match = NAME.match(part.name.removeprefix("."))  # so that temporary files are judged as well
    return match["shard"] if match else ""


def may_hold(part: Path, packs: range) -> bool:
    """Return whether a part may hold any of these packs."""
    span = _span(part)
    if span is None:
        return True
    fewer, more = sorted((span, packs), key=len)
    return any(pack in more for pack in fewer)


def may_hold_only(part: Path, packs: range) -> bool:
    """Return whether a part may hold none but these packs."""
    span = _span(part)
    return span is None or (span[0] in packs and span[-1] in packs)  # it does hold its first and last


def _span(part: Path) -> range | None:
    match = NAME.fullmatch(part.name)
    if not match or int(match["first"]) > int(match["last"]):
        return None
    return range(int(match["first"]), int(match["last"]) + 1, int(match["step"]))


def remove_parts(folder: Path, fingerprint: Fingerprint, packs: range, own: str = "") -> None:
    """Remove the parts of a computation that hold none but these packs.

    What another worker has saved that is still at work stays; `own` is the name of the caller's shard.
    """
    done = set(packs)
    for path in folder.glob("*.part.h5"):
        if not may_hold_only(path, packs):
            continue
        shard = shard_of(path)
        if shard not in ("", own) and lock_holder(folder.parent / shard):
            continue
        try:
            part = open_part(path)
        except (SeqmillError, OSError, IndexError):
            continue
        if not part.fingerprint.difference(fingerprint) and done.issuperset(part.packs.tolist()):
            path.unlink(missing_ok=True)


def remove_set_aside(folder: Path) -> None:
    """Remove the damaged parts that were set aside; for when nothing depends on parts any more."""
    for path in folder.glob("*.part.h5.damaged"):
        path.unlink(missing_ok=True)


def remove_unfinished(shard: Path) -> None:
    """Remove what killed workers of a shard, on any machine, have left half-written; its lock must be held."""
    parts = [path for path in parts_folder(shard).glob(".*.part.h5.*.tmp") if shard_of(path) == shard.name]
    for path in (*shard.parent.glob(f".{glob.escape(shard.name)}.*.tmp"), *parts):
        path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    return path.replace(path.with_name(path.name + ".damaged"))


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
        with suppress(SeqmillError, OSError):
            if not Fingerprint.from_attributes(read_status(status).fingerprint).difference(fingerprint):
                path.unlink()
                status.unlink()
