"""What the doctor finds, in words, and how it reads whatever lies there without stumbling."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, TypeVar

from seqmill.base.words import in_one_line
from seqmill.store.layout import logs_folder

LOG_TAIL = 1 << 16  # bytes read of a log

Stats = dict[str, os.stat_result]
T = TypeVar("T")


class Mend(IntEnum):
    """What a finding asks for; of several the highest comes first."""

    NOTHING = 0
    RUN = 1  # the workflow
    REMOVE = 2  # the file `about`, which Snakemake would take for good; then run
    REPAIR = 3  # do what `about` says; then run
    WAIT = 4  # a worker is at it
    ACCESS = 5  # `about` can't be read


class Finding(NamedTuple):
    """One thing found, in words, and what it asks for."""

    text: str
    mend: Mend = Mend.NOTHING
    about: str = ""


def shown(path: Path) -> str:
    """Return a path for the reader: relative if it is below the current directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def attempt(path: Path, read: Callable[..., T], *arguments: object) -> tuple[T | None, Finding | None]:
    """Return what `read` makes of the path, or the trouble with it."""
    try:
        return read(path, *arguments), None
    except Exception as error:  # a damaged file may make h5py, json and what builds on them raise anything
        return None, trouble_with(path, error)


def guarded(path: Path, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield the findings, and at an error the trouble with the path."""
    try:
        yield from findings
    except Exception as error:  # as above
        yield trouble_with(path, error)


def trouble_with(path: Path, error: Exception) -> Finding:
    text = f"{path.name}: {in_one_line(str(error).replace(f'{path}: ', ''))}"
    closed = exists(path) and not os.access(path, os.R_OK)
    if closed or isinstance(error, PermissionError | MemoryError) or path.is_dir():  # a folder is not to be removed
        return Finding(text, Mend.ACCESS, shown(path))
    if "this version reads" in text:
        return Finding(text, Mend.REPAIR, "use the version of seqmill that wrote it, or remove it")
    return Finding(text, Mend.REMOVE, shown(path))


def entries_of(folder: Path) -> Stats:
    """Return what lies in a folder; raise an OSError if that can't be told."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # removed at this moment, or a link that leads nowhere
                found[entry.name] = entry.stat()
    return found


def exists(path: Path) -> bool:
    """Return whether it does, as far as can be seen."""
    return os.access(path, os.F_OK)


def last_error(log: Path) -> str:
    """Return the last error of a log, to stand behind other words; empty if there is none."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - LOG_TAIL, 0))
        _, found, text = file.read().decode(errors="replace").rpartition(" ERROR ")
        return f": {in_one_line(text)}" if found else ""
    return ""


def build_error(folder: Path) -> str:
    """Return the error of the index's last build, to stand behind other words; empty if none, or the merge is newer."""
    log, manifest = logs_folder(folder) / "build_index.log", folder / "manifest.json"
    with suppress(OSError):
        if exists(manifest) and log.stat().st_mtime_ns < manifest.stat().st_mtime_ns:
            return ""
    return last_error(log)


def unbuilt(results: Path) -> list[Path]:
    """Return the folders of `results/`, `results/DATASET/` or `results/DATASET/MODEL/` whose index failed to build.

    Snakemake has removed them with the index, so that only its log remains.
    """
    folders = []
    for given, root in enumerate(results.parents[:3]):
        top = (results, *results.parents)[given]
        names = [*map(glob.escape, results.relative_to(top).parts), *["*"] * (2 - given)]
        for log in sorted((root / "logs").glob("/".join([*names, "build_index.log"]))):
            folder = top / log.parent.parent.name / log.parent.name
            if not exists(folder) and last_error(log):
                folders.append(folder)
    return folders
