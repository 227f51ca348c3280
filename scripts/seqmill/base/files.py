"""Writing files whole or not at all, refusing unusable paths, and digests."""

import glob
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import combinations
from pathlib import Path
from typing import Any

from seqmill.base.signals import is_alive
from seqmill.errors import SeqmillError

ABANDONED_SECONDS = 3600.0
SURROGATES = re.compile("[\ud800-\udfff]")


def cache_folder() -> Path:
    """Return seqmill's folder in the user's cache, which need not exist; raise a RuntimeError if there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqmill"


@contextmanager
def whole_or_absent(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` if the block succeeds.

    The file's bytes and then the folder entry are forced to disk, so that after a power cut `path` holds either all of
    its new content or its old content. After an exception the temporary file is removed and `path` is untouched.
    Temporary files that killed processes of this machine have left are removed first.
    """
    with _temporary(path) as temporary:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)


@contextmanager
def whole_folder_or_absent(path: Path) -> Iterator[Path]:
    """Yield a temporary folder in the folder of `path`; rename it to `path` if the block succeeds, else remove it.

    Raise a SeqmillError if `path` exists: it may hold other files, so it is not replaced.
    """
    _refuse_existing(path)
    with _temporary(path, is_folder=True) as temporary:
        yield temporary
        os.sync()  # once for all files: there may be millions
        _refuse_existing(path)
        temporary.replace(path)
        fsync(path.parent)


@contextmanager
def _temporary(path: Path, is_folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path for `path`; errors name `path`. Remove the temporary file or folder at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left(path.parent, glob.escape(path.name))
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    if is_folder:
        temporary.mkdir()
    try:
        with name_errors(path, temporary):
            yield temporary
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise SeqmillError(f"{path}: exists; remove it, or name another folder")


def remove_left(folder: Path, name: str = "*") -> None:
    """Remove temporary files and folders for `name` (a glob pattern) that killed processes of this machine left."""
    for left in folder.glob(f".{name}.{glob.escape(socket.gethostname())}.*.tmp"):
        process = left.name.split(".")[-2]
        if not (process.isdecimal() and is_alive(int(process))):
            _remove(left)


def remove_abandoned(outputs: Sequence[Path]) -> None:
    """Remove temporary files for `outputs`, all written by one program, that other machines' processes have abandoned.

    This machine can't tell whether such a process still runs. A live one writes to at least one of its temporary files,
    except during minutes in which it reads back or flushes them, so a process whose files have all been idle for an
    hour is treated as gone. Workflows run one job per output, so only programs started by hand could collide. A live
    process that was suspended for an hour finds its file missing and ends with an error; it writes nothing wrong.
    """
    here = f"{socket.gethostname()}."  # `remove_left` handles this machine's files
    of_process: dict[str, list[Path]] = defaultdict(list)
    for output in outputs:
        start = f".{output.name}."
        for path in output.parent.glob(f"{glob.escape(start)}*.tmp"):
            if not (process := path.name.removeprefix(start)).startswith(here):
                of_process[process].append(path)
    for paths in of_process.values():
        with suppress(OSError):  # a file was just renamed, so its process is alive; or it belongs to another user
            if time.time() - max(path.stat().st_mtime for path in paths) > ABANDONED_SECONDS:
                for path in paths:
                    path.unlink()


@contextmanager
def name_errors(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Put `path` into an OSError that names no file (a full disk) or names `temporary` or a file in that folder."""
    try:
        yield
    except OSError as error:
        named = str(error.filename or "")
        if named and not (temporary and named.startswith(str(temporary))):
            raise
        if error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        if type(error) is not OSError or str(error).startswith(str(path)):  # subclasses carry messages of their own
            raise
        raise OSError(f"{path}: {error}") from error  # for example Arrow's at close


def refuse_shared(outputs: Sequence[Path], inputs: Iterable[Path] = ()) -> None:
    """Raise a SeqmillError if two of `outputs` are the same file, or if writing one would replace one of `inputs`."""
    for source in inputs:
        for output in outputs:
            if output.exists() and source.exists() and output.samefile(source):
                raise SeqmillError(f"{output}: is the input as well as the output; nothing was written")
    for first, second in combinations(outputs, 2):
        linked = first.exists() and second.exists() and first.samefile(second)
        if linked or os.path.realpath(first) == os.path.realpath(second):
            raise SeqmillError(
                f"{second}: is named for two outputs; name a different file for each; nothing was written"
            )


def refuse_folder(path: Path) -> None:
    """Raise a SeqmillError if `path`, which should be a file, is a folder."""
    if path.is_dir():
        raise SeqmillError(f"{path}: is a folder; name a file in it")


def refuse_special(path: Path) -> None:
    """Raise a SeqmillError if `path` is a pipe, device or socket: it may never end, or be readable only once."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise SeqmillError(f"{path}: is a pipe, a device or a socket; write its content to a file and name that file")


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raise a SeqmillError if the disk of `folder` has less than `num_bytes` free for `what`."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise SeqmillError(
            f"{folder}: {what} need {num_bytes:,} bytes on this disk, and {free:,} are free; make room and run again"
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    with whole_or_absent(path) as temporary:
        temporary.write_text(json_text(content), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise a SeqmillError if the file is unreadable or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SeqmillError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise SeqmillError(f"{path}: not a JSON object: {reason}") from error
    if not isinstance(content, dict):
        raise SeqmillError(f"{path}: not a JSON object: it holds a {type(content).__name__}")
    return content


def json_text(content: dict[str, Any]) -> str:
    """Return `content` as indented JSON; surrogates, which stand for bytes of paths that are not UTF-8, are escaped."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # Two backslashes: readers would turn JSON's own escape, with one, back into a surrogate.
    return SURROGATES.sub(lambda match: rf"\\u{ord(match[0]):04x}", text)


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with name_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to disk."""
    with name_errors(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
