"""One worker a shard: an exclusive lock that the kernel frees however its holder ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from seqmill.base.files import name_errors
from seqmill.errors import SeqmillError

WAIT_SECONDS = 20.0  # an orphan of a killed workflow needs a moment to save its packs and leave
POLL_SECONDS = 0.25
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # of file systems that have none

log = logging.getLogger(__name__)


@contextmanager
def locked_shard(shard: Path, wait_seconds: float = WAIT_SECONDS) -> Iterator[bool]:
    """Hold the shard's lock, the file `.NAME.lock` beside it.

    Args:
        shard: the shard that is to be written.
        wait_seconds: how long to wait for a holder to leave.

    Yields:
        Whether it is held; not where the file system has no locks.

    Raises:
        SeqmillError: another worker holds it; says which.
    """
    path = lock_path_of(shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _acquire(path, shard, wait_seconds)
    if file is None:
        yield False
        return
    holder = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}"
    with file:
        try:
            with name_errors(path):
                os.truncate(file.fileno(), 0)
                os.write(file.fileno(), holder.encode())
            yield True
        finally:
            path.unlink(missing_ok=True)  # before the lock is freed, so that no one else's file is removed


def lock_path_of(shard: Path) -> Path:
    return shard.with_name(f".{shard.name}.lock")


def lock_holder(shard: Path) -> str:
    """Return who holds the shard's lock, in words; empty if no one does."""
    try:
        with lock_path_of(shard).open("r") as file:
            # Shared: for an exclusive one NFS wants a file that is open for writing.
            return "" if _lock(file, fcntl.LOCK_SH) else _holder(file)
    except OSError:
        return ""


def remove_free_locks(folder: Path) -> None:
    """Remove the locks that killed workers have left in a folder; one that is held stays."""
    for path in folder.glob(".*.h5.lock"):
        with suppress(OSError), path.open("r+") as file:
            if _lock(file) and _is_at(file, path):
                path.unlink()


def _acquire(path: Path, shard: Path, wait_seconds: float) -> IO[str] | None:
    """Return the open, locked file; None where the file system has no locks."""
    deadline = time.monotonic() + wait_seconds
    said = False
    while True:
        file = path.open("a+")
        try:
            if _lock(file):
                if _is_at(file, path):
                    return file
                file.close()  # its holder has just removed it: another file has the name now
                continue
        except OSError as error:
            file.close()
            if error.errno not in NO_LOCKS:
                raise
            log.warning("%s: the file system has no locks: two workers on this shard would not be noticed", path)
            return None
        holder = _holder(file)
        file.close()
        if time.monotonic() >= deadline:
            raise SeqmillError(
                f"{shard}: another worker is computing this shard: {holder}; wait for it, or stop it and run again"
            )
        if not said:
            said = True
            log.info("%s is held by %s; waiting up to %.0f s", shard, holder, wait_seconds)
        time.sleep(POLL_SECONDS)


def _lock(file: IO[str], kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read() or "a process that has not said its name yet"
