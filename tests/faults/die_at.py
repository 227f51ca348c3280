"""Run embed_shard.py in this process, which sends itself SIGKILL at a named moment: die_at.py MOMENT ARGUMENTS...

Python calls an audit hook (PEP 578) just before it opens, renames or removes a file. A moment is a list of
such events; the process dies before the last of them happens. To die during a write, a wrapper writes half.
"""

import os
import re
import runpy
import signal
import sys
from typing import Any

from workers import PROGRAM

NEW_PART, PART, PARTS = r"\.part\.h5\..+\.tmp$", r"\.part\.h5$", r"/parts$"
NEW_SHARD, SHARD = r"/\.shard_\d+-of-\d+\.h5\..+\.tmp$", r"/shard_\d+-of-\d+\.h5$"
NEW_STATUS, STATUS = r"\.status\.json\..+\.tmp$", r"\.status\.json$"
LOCK = r"\.lock$"

EVENTS: dict[str, list[tuple[str, str]]] = {
    "before the first status": [("os.rename", STATUS)],
    "before the first part": [("open", NEW_PART)],
    "before the rename of the third part": [("os.rename", PART)] * 3,
    "after the rename of the third part": [*[("os.rename", PART)] * 3, ("open", PARTS)],
    "before the shard's data": [("open", NEW_SHARD)],
    "before the rename of the shard": [("os.rename", SHARD)],
    "after the rename of the shard": [("os.rename", SHARD), ("open", SHARD)],
    "before the link of the shard": [("os.link", SHARD)],
    "before the removal of the third part": [("os.remove", PART)] * 3,
    "before the final status": [("os.rename", SHARD), ("open", NEW_STATUS)],
    "before the rename of the final status": [("os.rename", SHARD), ("os.rename", STATUS)],
    "before the removal of the lock": [("os.remove", LOCK)],
}
WRITES = ("amid the third part's data", "amid the shard's data")
MOMENTS = (*EVENTS, *WRITES)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_events(steps: list[tuple[str, str]]) -> None:
    left = list(steps)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event != left[0][0]:
            return
        path = arguments[1 if event == "os.rename" else 0]
        if isinstance(path, str | os.PathLike) and re.search(left[0][1], os.fspath(path)):
            if len(left) == 1:
                die()
            left.pop(0)

    sys.addaudithook(hook)


def die_amid_the_third_parts_data() -> None:
    from seqmill.base.hdf5 import _PatientFile

    write, seen = _PatientFile.write, set()

    def write_half(self: _PatientFile, data: bytes | memoryview) -> int:
        if re.search(NEW_PART, str(self.name)):
            seen.add(self.name)
            if len(seen) == 3:
                write(self, memoryview(data).cast("B")[: len(data) // 2])
                die()
        return write(self, data)

    _PatientFile.write = write_half  # type: ignore[method-assign]


def die_amid_the_shards_data() -> None:
    from seqmill.base.hdf5 import RowWriter

    append, calls = RowWriter.append, []

    def append_half(self: RowWriter, rows: Any) -> None:
        calls.append(len(rows))
        if len(calls) == 3:
            append(self, rows[: len(rows) // 2])
            die()
        append(self, rows)

    RowWriter.append = append_half  # type: ignore[method-assign]


def main() -> None:
    moment = sys.argv[1]
    sys.argv = [str(PROGRAM), *sys.argv[2:]]
    if moment in EVENTS:
        die_at_events(EVENTS[moment])
    elif moment == "amid the third part's data":
        die_amid_the_third_parts_data()
    else:
        die_amid_the_shards_data()
    runpy.run_path(str(PROGRAM), run_name="__main__")


if __name__ == "__main__":
    main()
