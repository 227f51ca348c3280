"""Workers on one machine never use a device at the same time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from pipeline import SCRIPTS

HOLD = """
import sys, time
from pathlib import Path
from seqpack.lease import leased_gpu
with leased_gpu() as gpu:
    assert gpu == __import__("os").environ["CUDA_VISIBLE_DEVICES"]
    mark = Path(sys.argv[1]) / gpu.replace("/", "_")
    mark.touch(exist_ok=False)  # fails if another worker has the device
    print(gpu, flush=True)
    time.sleep(float(sys.argv[2]))
    while (mark.parent / "wait").exists():
        time.sleep(0.05)
    mark.unlink()
"""
UUIDS = [f"MIG-GPU-{number:08x}/1/0" for number in range(4)]


def start(folder: Path, gpus: str, seconds: float, code: str = HOLD) -> subprocess.Popen[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus, "TMPDIR": str(folder), "PYTHONPATH": str(SCRIPTS)}
    marks = folder / "marks"
    marks.mkdir(exist_ok=True)
    command = [sys.executable, "-c", code, str(marks), str(seconds)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_forty_workers_share_sixteen_devices(tmp_path: Path) -> None:
    gpus = [str(number) for number in range(16)]
    marks = tmp_path / "marks"
    marks.mkdir()
    (marks / "wait").touch()
    workers = [start(tmp_path, ",".join(gpus), 0.1) for _ in range(40)]
    deadline = time.monotonic() + 120
    while {path.name for path in marks.iterdir()} != {"wait", *gpus} and time.monotonic() < deadline:
        time.sleep(0.05)
    (marks / "wait").unlink()  # with all 16 taken; the other 24 workers queue
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 40, [error for _, error in outputs if error]
    used = Counter(output.strip() for output, _ in outputs)
    assert used.keys() == set(gpus)


def test_a_killed_worker_frees_its_device(tmp_path: Path) -> None:
    first = start(tmp_path, ",".join(UUIDS[:2]), 60)
    assert first.stdout is not None
    taken = first.stdout.readline().strip()
    second = start(tmp_path, ",".join(UUIDS[:2]), 0)
    output, _ = second.communicate(timeout=60)
    assert {taken, output.strip()} == set(UUIDS[:2])
    first.send_signal(signal.SIGKILL)
    first.communicate()
    (tmp_path / "marks" / taken.replace("/", "_")).unlink()
    third = start(tmp_path, ",".join(UUIDS[:2]), 0)
    output, _ = third.communicate(timeout=60)
    assert output.strip() == taken


def test_one_device_or_none_needs_no_lease(tmp_path: Path) -> None:
    code = "from seqpack.lease import leased_gpu\nwith leased_gpu() as gpu: print(gpu)"
    for gpus in ("", "3"):
        output, _ = start(tmp_path, gpus, 0, code).communicate(timeout=60)
        assert output.strip() == "None"
    assert not list(tmp_path.glob("seqpack-gpus-*"))


def test_waiting_is_said(tmp_path: Path) -> None:
    code = "import logging\nlogging.basicConfig(level=logging.INFO)\n" + HOLD
    holders = [start(tmp_path, "0,1", 3) for _ in range(2)]
    for holder in holders:
        assert holder.stdout is not None
        holder.stdout.readline()
    waiter = start(tmp_path, "0,1", 0, code)
    output, error = waiter.communicate(timeout=60)
    for holder in holders:
        holder.communicate()
    assert output.strip() in ("0", "1")
    assert re.search(r"all 2 GPUs are taken .* waiting for one", error)
