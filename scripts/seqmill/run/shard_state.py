"""Judges the state of a shard by its status JSON, its lock and its file."""

import math
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from seqmill.base.locks import lock_holder, lock_path_of
from seqmill.base.words import ago
from seqmill.run.findings import Finding, Remedy, try_read
from seqmill.run.walk import Files, exists
from seqmill.store.layout import status_path_of
from seqmill.store.status import FAILED, RUNNING, ShardStatus, read_status

# A worker updates its status every half minute, but not during a pack that takes longer.
OLD_SECONDS = 300.0
STALE, WAITING, UNREADABLE = "stale", "waiting", "unreadable"


class ShardState(NamedTuple):
    """The state of a shard.

    It is complete, failed or running, as its status JSON says; running also while its lock is held; stale if it says it
    is running, but its worker seems gone; waiting without a status JSON; unreadable with a damaged one.
    """

    path: Path
    state: str = WAITING
    status: ShardStatus | None = None  # None if it is absent or unreadable
    has_file: bool = False  # whether the shard itself exists
    holder: str = ""  # of the lock
    doubt: str = ""  # why it is stale
    trouble: Finding | None = None  # why its status JSON can't be read


def judge_shard(path: Path, files: Files) -> ShardState:
    """Judge a shard; `files` are those listed in its folder. Never raises, whatever its status JSON holds."""
    status_path = status_path_of(path)
    if status_path not in files and lock_path_of(path) not in files:
        return ShardState(path, has_file=path in files)
    status, trouble, doubt = None, None, ""
    if status_path in files:
        status, trouble = try_read(status_path, read_status)
    holder = lock_holder(path)
    if status and status.status == RUNNING and (doubt := _doubt(path, status, holder)):
        status, trouble = try_read(status_path, read_status)  # the worker may have ended in between
        doubt = doubt if status and status.status == RUNNING else ""
    if holder or (status and status.status == RUNNING):
        state = STALE if doubt else RUNNING
    else:
        state = UNREADABLE if trouble else status.status if status else WAITING
    return ShardState(path, state, status, path in files or exists(path), holder, doubt, trouble)


def _doubt(path: Path, status: ShardStatus, holder: str) -> str:
    """Return why the worker of a running shard seems to be gone; empty if it does not.

    Only on the worker's own machine is a free lock proof: some file systems hide locks from other machines.
    """
    is_old = time.time() - seconds_of(status.updated) > OLD_SECONDS
    heard = f"last heard of {ago(status.updated)}"
    if not holder and not _is_of_another_machine(lock_path_of(path)):
        return f"{heard}, and no one holds its lock"
    return heard if is_old else ""


def _is_of_another_machine(lock: Path) -> bool:
    try:
        return f" on {socket.gethostname()} since " not in lock.read_text(errors="replace")
    except OSError as error:
        return not isinstance(error, FileNotFoundError)


def seconds_of(when: str) -> float:
    """Return an ISO 8601 time in seconds since 1970; minus infinity if it is none."""
    try:
        return datetime.fromisoformat(when).timestamp()
    except (ValueError, OverflowError, OSError):
        return -math.inf


def is_at_work(shard: ShardState) -> bool:
    """Return whether a shard is being computed or has failed, rather than never begun or deleted after the merge."""
    hidden = shard.trouble is not None and shard.trouble.remedy == Remedy.ACCESS
    return hidden or shard.state in (RUNNING, STALE, FAILED)
