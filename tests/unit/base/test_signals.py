"""No orphan, and no two workers on a shard: shown with processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import SCRIPTS
from seqmill.base.locks import lock_holder, lock_path_of, locked_shard
from seqmill.base.signals import is_alive
from seqmill.errors import SeqmillError
from seqmill.store.part_file import open_part

WATCHER = "import sys, time; from seqmill.base.signals import stop_with_parent; stop_with_parent(int(sys.argv[1]));"
HOLDER = (
    "import sys; from pathlib import Path; from seqmill.base.locks import locked_shard\n"
    "with locked_shard(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


def python(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, **options)  # type: ignore[call-overload]


def test_a_worker_ends_with_the_process_it_was_told_to_watch() -> None:
    watched = subprocess.Popen(["sleep", "60"])
    worker = python(WATCHER + "print('on', flush=True); time.sleep(60)", watched.pid)
    assert worker.stdout
    assert worker.stdout.readline() == "on\n"
    assert worker.poll() is None
    watched.kill()  # not waited for: it stays a zombie, which is dead enough
    assert worker.wait(timeout=20) == -signal.SIGTERM
    watched.wait()


def test_a_worker_ends_with_its_own_parent_while_the_watched_one_lives() -> None:
    """As when a workflow kills the shell between itself and the worker."""
    shell = subprocess.Popen(
        ["bash", "-c", f'{sys.executable} -c "$1" {os.getpid()} & echo $!; wait', "bash", WATCHER + "time.sleep(60)"],
        env={**os.environ, "PYTHONPATH": str(SCRIPTS)},
        text=True,
        stdout=subprocess.PIPE,
    )
    assert shell.stdout
    worker = int(shell.stdout.readline())
    time.sleep(1.5)
    assert Path("/proc", str(worker)).exists()
    shell.kill()
    shell.wait()
    deadline = time.monotonic() + 20
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(worker)


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


def test_a_worker_waits_for_the_one_before_to_leave(tmp_path: Path) -> None:
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
    """The lock file is removed by each holder; a newcomer must not lock the file that is being removed."""
    code = (
        "import os, sys; from pathlib import Path; import seqmill.base.locks as l; l.POLL_SECONDS = 0.001\n"
        "shard, mark = Path(sys.argv[1]), Path(sys.argv[1] + '.mark')\n"
        "for _ in range(25):\n"
        "    with l.locked_shard(shard, 60): os.close(os.open(mark, os.O_CREAT | os.O_EXCL)); mark.unlink()\n"
    )
    workers = [python(code, tmp_path / "s.h5") for _ in range(4)]
    assert [worker.wait(timeout=120) for worker in workers] == [0] * 4


WRITES_IDS = """
import os, signal, sys, threading, time
from pathlib import Path
import numpy as np
from seqmill.base.hdf5 import new_hdf5, write_strings
from seqmill.base.signals import Signals
signals = Signals()
signals.catch()
def interrupt():
    time.sleep(float(sys.argv[2]))
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=interrupt).start()
while True:
    with new_hdf5(Path(sys.argv[1])) as file:
        write_strings(file, "ids", np.arange(100_000), lambda rows: [str(row) for row in rows])
"""


def test_a_signal_while_hdf5_writes_does_not_crash_the_process(tmp_path: Path) -> None:
    """HDF5 writes through Python; an exception in there used to end in a segmentation fault."""
    for number in range(8):
        writer = python(WRITES_IDS, tmp_path / "ids.h5", 0.05 + 0.03 * number)
        assert writer.wait(timeout=60) == 128 + signal.SIGTERM


SLOW_DISK = """
import os, signal, sys, threading, time
from contextlib import contextmanager
from pathlib import Path
import numpy as np
from seqmill.embed.part_writer import PartWriter
import seqmill.store.part_file as part_file
from seqmill.store.parts import PartStore
from seqmill.spec.fingerprint import Fingerprint
from seqmill.base.signals import Signals
from seqmill.store.part_file import PackResult
real = part_file.whole_or_absent
@contextmanager
def slow(path):
    with real(path) as temporary:
        yield temporary
        time.sleep(1)
part_file.whole_or_absent = slow
class Told:
    def add(self, *_): pass
signals = Signals()
signals.catch()
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
none = np.empty(0, np.int64)
fingerprint = Fingerprint("i", "m", "d", "6", "mean", "float32")
with PartWriter(PartStore(Path(sys.argv[1]), None, fingerprint), "a", 0, Told()) as w:
    w.add(PackResult(0, np.arange(2), np.ones((2, 4), np.float32), none), "")
    w._seconds = 1000
    for pack in (1, 2):
        w.add(PackResult(pack, np.arange(2), np.ones((2, 4), np.float32), none), "")
"""


def test_a_signal_while_the_last_part_waits_for_the_disk_loses_nothing(tmp_path: Path) -> None:
    writer = python(SLOW_DISK, tmp_path)
    assert writer.wait(timeout=60) == 128 + signal.SIGTERM
    parts = [open_part(path).packs.tolist() for path in sorted(tmp_path.glob("*.part.h5"))]
    assert parts == [[0], [1, 2]]
