"""Locks that the kernel frees however their holder ends: on open files, and on shards for one worker each."""

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
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # from file systems without locks

log = logging.getLogger(__name__)


def try_lock(file: IO[str] | int, shared: bool = False) -> bool | None:
    """Lock an open file (flock) without waiting; closing the file frees the lock.

    Return whether this process now holds the lock; None if the file system has no locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def is_locked(path: Path) -> bool:
    """Return whether any process holds a lock on a file, shared or exclusive; False if that is unknown."""
    try:
        # NFS grants the exclusive lock, which also detects shared ones, only on a file opened for writing.
        with path.open("r+" if os.access(path, os.W_OK) else "r") as file:
            return try_lock(file) is False
    except OSError:
        return False


@contextmanager
def locked_shard(shard: Path, wait_seconds: float = WAIT_SECONDS) -> Iterator[bool]:
    """Hold a shard's lock, the file `.NAME.lock` in its folder; wait at most `wait_seconds` for another holder.

    Yield whether the lock is held: False if the file system has no locks. If another worker still holds it, raise a
    SeqmillError that names the worker.
    """
    path = lock_path_of(shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _acquire(path, shard, wait_seconds)
    if file is None:
        yield False
        return
    holder = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}"
    try:
        with name_errors(path):
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), holder.encode())
        yield True
    finally:
        with name_errors(path), file:
            path.unlink(missing_ok=True)  # while the lock is held, so that no successor's file is removed


def lock_path_of(shard: Path) -> Path:
    return shard.with_name(f".{shard.name}.lock")


def lock_holder(shard: Path) -> str:
    """Return a description of the process that holds the shard's lock; empty if none does."""
    try:
        with lock_path_of(shard).open("r") as file:
            # NFS grants an exclusive lock only on a file opened for writing.
            return _holder(file) if try_lock(file, shared=True) is False else ""
    except OSError:
        return ""


def remove_free_locks(folder: Path) -> None:
    """Remove the lock files in a folder that no process holds: killed workers leave them."""
    for path in folder.glob(".*.h5.lock"):
        with suppress(OSError), path.open("r+") as file:
            if try_lock(file) and _is_at(file, path):
                path.unlink()


def _acquire(path: Path, shard: Path, wait_seconds: float) -> IO[str] | None:
    """Return the open, locked file; None if the file system has no locks."""
    deadline = time.monotonic() + wait_seconds
    told = False
    while True:
        file = path.open("a+")
        with name_errors(path):
            locked = try_lock(file)
        if locked and _is_at(file, path):
            return file
        holder = _holder(file) if locked is False else ""
        file.close()
        if locked is None:
            log.warning("%s: the file system has no locks: two workers on this shard would go unnoticed", path)
            return None
        if locked:  # the previous holder has just removed this file: lock the new one
            continue
        if time.monotonic() >= deadline:
            raise SeqmillError(
                f"{shard}: another worker is computing this shard: {holder}; wait for it, or stop it and run again"
            )
        if not told:
            told = True
            log.info("%s is held by %s; waiting up to %.0f s", shard, holder, wait_seconds)
        time.sleep(POLL_SECONDS)


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read() or "a process that has not written its name yet"
