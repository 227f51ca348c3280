"""What the doctor finds: a text and a remedy. Reading a damaged file becomes a finding, not an error."""

import os
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, TypeVar

from seqmill.base.words import in_one_line
from seqmill.run.walk import exists

T = TypeVar("T")


class Remedy(IntEnum):
    """What to do about a finding; among several, the highest comes first."""

    NOTHING = 0
    RUN = 1  # run the workflow
    REMOVE = 2  # remove the file `about`, which Snakemake would take for complete; then run
    REPAIR = 3  # do what `about` says; then run
    WAIT = 4  # a worker is computing
    ACCESS = 5  # make `about` readable


class Finding(NamedTuple):
    text: str
    remedy: Remedy = Remedy.NOTHING
    about: str = ""


def shown(path: Path) -> str:
    """Return a path for the reader: relative if it is below the current directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def try_read(path: Path, read: Callable[..., T], *arguments: object) -> tuple[T | None, Finding | None]:
    """Return what `read` makes of a path, or the trouble with it."""
    try:
        return read(path, *arguments), None
    except Exception as error:  # h5py, json and their callers may raise anything for a damaged file
        return None, trouble_with(path, error)


def guarded(path: Path, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield the findings; on an error, the trouble with the path instead of the rest."""
    try:
        yield from findings
    except Exception as error:  # as above
        yield trouble_with(path, error)


def trouble_with(path: Path, error: Exception) -> Finding:
    text = f"{path.name}: {in_one_line(str(error).replace(f'{path}: ', ''))}"
    closed = exists(path) and not os.access(path, os.R_OK)
    if closed or isinstance(error, PermissionError | MemoryError) or path.is_dir():  # never advise to remove a folder
        return Finding(text, Remedy.ACCESS, shown(path))
    if "this version reads" in text:
        return Finding(text, Remedy.REPAIR, "use the version of seqmill that wrote it, or remove it")
    return Finding(text, Remedy.REMOVE, shown(path))
