"""Files that are either whole or absent, and their digests."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seqpack.errors import SeqpackError


@contextmanager
def whole_or_absent(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` if the block succeeds.

    The file's bytes and then the folder entry are forced to disk, so that after a power cut `path`
    holds either all of the new content or what it held before. On any exception the temporary file
    is removed and `path` is untouched; what a killed process of this machine has left is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left(path.parent, glob.escape(path.name))
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with name_errors(path):
            yield temporary
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_left(folder: Path, name: str = "*") -> None:
    """Remove the temporary files for `name` (a glob pattern) that killed processes of this machine have left."""
    for left in folder.glob(f".{name}.{glob.escape(socket.gethostname())}.*.tmp"):
        if not Path("/proc", left.name.split(".")[-2]).exists():
            left.unlink(missing_ok=True)


@contextmanager
def name_errors(path: Path) -> Iterator[None]:
    """Add `path` to an error of the operating system that names no file, as that of a full disk does."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def refuse_to_replace(source: Path, output: Path) -> None:
    """Raise a SeqpackError if writing `output` would replace the input `source`."""
    if output.exists() and source.exists() and output.samefile(source):
        raise SeqpackError(f"{output}: is the input as well as the output; nothing was written")


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raise a SeqpackError if the disk of `folder` has less than `num_bytes` free for `what`."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise SeqpackError(
            f"{folder}: {what} need {num_bytes:,} bytes on this disk, of which {free:,} are free; "
            "make room and run again"
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    with whole_or_absent(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
