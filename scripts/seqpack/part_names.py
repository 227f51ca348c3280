"""What the name of a part file says: whose it is, and which packs it may hold, without opening it.

`shard_3-of-8.h5_pack_00000003-00000027-by-8.part.h5` is of a worker that writes shard_3-of-8.h5, and holds packs 3
and 27 and none but 3, 11, 19 and 27. The whole name of the shard stands in it, which need not be of this form, as it
names the shard's lock as well. A file with another name may hold anything.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

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
