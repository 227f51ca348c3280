"""Signals leave no orphaned worker and no damaged file; tested with processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import SCRIPTS
from seqmill.base import signals
from seqmill.base.signals import is_alive
from seqmill.store.part_file import open_part

WATCHER = "import sys, time; from seqmill.base.signals import stop_with_parent; stop_with_parent(int(sys.argv[1]));"


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
    watched.kill()  # not waited for, so it becomes a zombie, which counts as dead
    assert worker.wait(timeout=20) == -signal.SIGTERM
    watched.wait()


def test_a_worker_ends_with_its_own_parent_while_the_watched_process_lives() -> None:
    """For example when a workflow kills the shell between itself and the worker."""
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


WRITES_IDS = """
import os, signal, sys, threading, time
from pathlib import Path
import numpy as np
from seqmill.base.hdf5 import new_hdf5
from seqmill.base.signals import Signals
signals = Signals()
signals.catch()
def interrupt():
    time.sleep(float(sys.argv[2]))
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=interrupt).start()
while True:
    with new_hdf5(Path(sys.argv[1])) as file:
        file.write_strings("ids", np.arange(100_000), lambda rows: [str(row) for row in rows])
"""


def test_a_signal_while_hdf5_writes_does_not_crash_the_process(tmp_path: Path) -> None:
    """HDF5 writes through Python; an exception there used to cause a segmentation fault."""
    for number in range(8):
        writer = python(WRITES_IDS, tmp_path / "ids.h5", 0.05 + 0.03 * number)
        assert writer.wait(timeout=60) == 128 + signal.SIGTERM


IMPORTS = """
import sys
from pathlib import Path
from seqmill.base.imports import importing_much
from seqmill.base.signals import Signals
Path(sys.argv[1], "large.py").write_text("import os; os.kill(os.getpid(), 15); print('imported', flush=True)")
sys.path.append(sys.argv[1])
Signals().catch()
with importing_much():
    import large
print("went on", flush=True)
"""


def test_a_signal_waits_for_the_end_of_a_large_import(tmp_path: Path) -> None:
    """While torch is imported, its C++ code calls Python; an exception there used to abort the process."""
    stopped = python(IMPORTS, tmp_path)
    assert stopped.communicate(timeout=60)[0] == "imported\n"
    assert stopped.returncode == 128 + signal.SIGTERM


SLOW_DISK = """
import os, signal, sys, threading, time
from contextlib import contextmanager
from pathlib import Path
import numpy as np
from seqmill.embedding.part_writer import PartWriter
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


def test_is_alive_with_and_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for _ in range(2):
        assert is_alive(os.getpid())
        assert is_alive(os.getppid())
        assert not is_alive(ended.pid)
        assert not is_alive(2**22 + 1)  # above any process id
        assert not is_alive(2**70)
        monkeypatch.setattr(signals, "PROC", tmp_path)
