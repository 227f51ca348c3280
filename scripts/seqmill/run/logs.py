"""Reads the last error of a log."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from seqmill.base.words import in_one_line
from seqmill.store.layout import RunFolder

TAIL_BYTES = 1 << 16  # read from the end of a log


def exists(path: Path) -> bool:
    """Return whether a path exists; False, not an error, where this user can't tell."""
    return os.access(path, os.F_OK)


def last_error(log: Path) -> str:
    """Return ": " and the last error of a log in one line; empty if there is none."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - TAIL_BYTES, 0))
        _, found, text = file.read().decode(errors="replace").rpartition(" ERROR ")
        return f": {in_one_line(text)}" if found else ""
    return ""


def build_error(run: RunFolder) -> str:
    """Return the error of the last index build, as `last_error`; empty if a merge has succeeded since."""
    with suppress(OSError):
        if exists(run.manifest) and run.index_log.stat().st_mtime_ns < run.manifest.stat().st_mtime_ns:
            return ""
    return last_error(run.index_log)
