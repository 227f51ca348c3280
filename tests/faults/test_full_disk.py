"""Disks that are full from the start, or that fill up during a run."""

import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from workers import EACH_PACK, Undisturbed, embed, finish, left_behind, parts_in, start, status_of

from pipeline import Run
from seqmill.store.index import open_index

DISK_BYTES = 4 << 20
ROW_BYTES = 4 * 320


def limited_to(num_bytes: int) -> Callable[[], None]:
    """No file of the process may grow beyond `num_bytes`: a write beyond that fails like one on a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    return limit


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of DISK_BYTES, in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small file system needs root: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Write a file that takes all the space except `leave` bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        rest = shutil.disk_usage(disk).free - leave
        while rest > 0:
            try:
                rest -= file.write(b"\0" * min(rest, 4096))
            except OSError:
                break
    return filler


def assert_told_in_one_line(code: int, output: str, culprit: str) -> None:
    assert code == 1, output
    assert "Traceback" not in output
    last = output.splitlines()[-1]
    assert culprit in last
    assert last.endswith("make room and run again: finished packs are saved")


def test_a_disk_full_of_parts(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A part that can't be written stops the worker; once there is room, the next attempt uses the parts before it."""
    run = undisturbed.again(tmp_path / "run", 1)
    largest = int(rows_of_packs(undisturbed)[-1]) * ROW_BYTES  # the last pack has the most sequences
    done = embed(run, 0, *EACH_PACK, preexec_fn=limited_to(largest))
    assert_told_in_one_line(done.returncode, done.stderr, ".part.h5")
    assert status_of(run)["status"] == "failed"
    assert status_of(run)["error"]["type"] == "OSError"
    parts = len(parts_in(run))
    assert parts >= 2
    assert len(left_behind(run.folder)) == parts + 1  # the parts and their folder: nothing half-written, no lock
    digest, packs = finish(run)
    assert digest == undisturbed.digest
    assert packs == parts


def test_a_disk_full_before_the_shard(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Every pack is saved but the shard does not fit: the next attempt computes nothing."""
    run = undisturbed.again(tmp_path / "run", 1)
    rows = rows_of_packs(undisturbed)
    done = embed(run, 0, *EACH_PACK, preexec_fn=limited_to(int(rows.sum()) * ROW_BYTES))
    assert_told_in_one_line(done.returncode, done.stderr, "shard_0-of-1.h5")
    assert not run.shards[0].exists()
    assert len(parts_in(run)) == len(rows)
    digest, packs = finish(run)
    assert digest == undisturbed.digest
    assert packs == len(rows)
    assert left_behind(run.folder) == []


def test_a_file_system_that_fills_up_during_a_run(undisturbed: Undisturbed, small_disk: Path) -> None:
    """The same on a real file system without a free byte, where even the status JSON may not fit."""
    run = undisturbed.again(small_disk / "run", 1)
    worker = start(run, 0, *EACH_PACK)
    try:
        while len(parts_in(run)) < 2:
            assert worker.poll() is None
            time.sleep(0.005)
        filler = fill(small_disk)
        _, output = worker.communicate(timeout=300)
    finally:
        worker.kill()
    assert_told_in_one_line(worker.returncode, output, ".part.h5")
    assert "No space left on device" in output.splitlines()[-1]
    assert status_of(run)["status"] != "complete"
    assert not run.shards[0].exists()
    parts = len(parts_in(run))
    assert parts >= 2
    filler.unlink()
    digest, packs = finish(run)
    assert digest == undisturbed.digest
    assert packs == parts
    assert left_behind(run.folder) == []


def test_too_little_room_is_found_before_the_computation(undisturbed: Undisturbed, small_disk: Path) -> None:
    """The worker estimates the size of the shard and its parts: the message has the needed and the free bytes."""
    run = undisturbed.again(small_disk / "run", 1)
    needed = 2 * int(rows_of_packs(undisturbed).sum()) * ROW_BYTES
    fill(small_disk, leave=needed // 2)
    done = embed(run, 0)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert f"the shard and its part files need {needed:,} bytes on this disk, and " in last
    assert last.endswith("are free; make room and run again")
    status = status_of(run)
    assert status["status"] == "failed"
    assert status["error"]["type"] == "SeqmillError"
    assert "compute" not in status["seconds"]
    assert parts_in(Run(run.folder, 1)) == []


def rows_of_packs(undisturbed: Undisturbed) -> np.ndarray:
    return np.diff(open_index(undisturbed.index).pack_offsets)
