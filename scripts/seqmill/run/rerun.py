"""Modification times that make Snakemake repeat the jobs of stale files, and no others."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from seqmill.base.files import whole_or_absent

AGED_SECONDS = 60.0


def mark_stale(mark: Path, reasons: Mapping[Path, str], made: Iterable[Path]) -> None:
    """Make Snakemake repeat the jobs of stale files: `mark`, an input of their rules, becomes newer than they are.

    A modification time in the future, left by a clock that was set back, moves to the past: Snakemake treats an
    output that is older than its input as a failure.

    Args:
        mark: written with the reasons if there are any, or if it does not exist.
        reasons: by the paths of the stale files.
        made: all files that the workflow makes; they need not exist.
    """
    now = time.time()
    for path in made:
        with suppress(FileNotFoundError):
            if path.stat().st_mtime >= now:
                os.utime(path, (now, now - AGED_SECONDS))
    if reasons or not mark.exists():
        mark.parent.mkdir(parents=True, exist_ok=True)
        # Snakemake compares small files by their bytes as well, so the time goes into the file.
        lines = [f"{time.time_ns()}", *(f"{path}: {reason}" for path, reason in reasons.items())]
        with whole_or_absent(mark) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
