"""Locks are exclusive, name their holder, and end with it; tested with processes."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import SCRIPTS
from preload import NO_LOCKS, preloaded
from seqmill.base.locks import is_locked, lock_holder, lock_path_of, locked_shard, try_lock
from seqmill.errors import SeqmillError

HOLDER = (
    "import sys; from pathlib import Path; from seqmill.base.locks import locked_shard\n"
    "with locked_shard(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


def python(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, **options)  # type: ignore[call-overload]


def test_an_open_file_is_locked_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)
    for shared in (False, True):
        with path.open("a") as first, path.open("a") as second:
            assert not is_locked(path)
            assert try_lock(first, shared) is True
            assert try_lock(second, shared) is shared
            assert is_locked(path)
    assert not is_locked(path)


def test_a_file_system_without_locks_is_not_mistaken_for_a_held_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys; from pathlib import Path; from seqmill.base.locks import is_locked, try_lock\n"
        "with open(sys.argv[1], 'a') as file: print(try_lock(file), is_locked(Path(sys.argv[1])))"
    )
    environment = {**preloaded(NO_LOCKS, tmp_path, LOCK_ERRNO=errno.ENOLCK), "PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True)
    assert done.stdout == "None False\n", done.stderr


def test_the_second_worker_is_told_who_holds_the_shard(tmp_path: Path) -> None:
    shard = tmp_path / "shard_0-of-1.h5"
    assert lock_holder(shard) == ""
    holder = python(HOLDER, shard, stdin=subprocess.PIPE)
    assert holder.stdout
    assert holder.stdin
    assert holder.stdout.readline() == "held\n"
    assert f"process {holder.pid} on " in lock_holder(shard)
    with pytest.raises(SeqmillError, match=rf"another worker is computing this shard: process {holder.pid} on"):
        locked_shard(shard, wait_seconds=0.5).__enter__()
    holder.stdin.close()
    assert holder.wait(timeout=20) == 0
    assert not lock_path_of(shard).exists()
    assert lock_holder(shard) == ""


def test_the_lock_of_a_killed_worker_is_free(tmp_path: Path) -> None:
    shard = tmp_path / "shard_0-of-1.h5"
    holder = python(HOLDER, shard, stdin=subprocess.PIPE)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    assert lock_path_of(shard).exists()
    with locked_shard(shard, wait_seconds=5):
        pass
    assert not lock_path_of(shard).exists()


def test_a_worker_waits_for_the_previous_lock_holder(tmp_path: Path) -> None:
    """An orphan needs a moment to save its packs."""
    shard = tmp_path / "shard_0-of-1.h5"
    holder = python(HOLDER, shard, stdin=subprocess.PIPE)
    assert holder.stdout
    assert holder.stdin
    assert holder.stdout.readline() == "held\n"
    waiter = python(HOLDER, shard, stdin=subprocess.PIPE)
    assert waiter.stdout
    time.sleep(1)
    holder.stdin.close()
    assert waiter.stdout.readline() == "held\n"
    waiter.communicate("")
    assert waiter.returncode == 0


def test_a_hundred_rounds_of_four_workers_never_overlap(tmp_path: Path) -> None:
    """Each holder removes the lock file; another worker must not lock the file that is being removed."""
    code = (
        "import os, sys; from pathlib import Path; import seqmill.base.locks as l; l.POLL_SECONDS = 0.001\n"
        "shard, mark = Path(sys.argv[1]), Path(sys.argv[1] + '.mark')\n"
        "for _ in range(25):\n"
        "    with l.locked_shard(shard, 60): os.close(os.open(mark, os.O_CREAT | os.O_EXCL)); mark.unlink()\n"
    )
    workers = [python(code, tmp_path / "s.h5") for _ in range(4)]
    assert [worker.wait(timeout=120) for worker in workers] == [0] * 4
