"""Workers on one machine never use a device at the same time."""

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from fake_gpus import UUIDS as GPU_UUIDS
from fake_gpus import write_nvidia_smi
from pipeline import SCRIPTS
from preload import NO_LOCKS, preloaded

HOLD = """
import sys, time
from pathlib import Path
from seqmill.embedding.lease import leased_gpu
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
PRINT = "from seqmill.embedding.lease import leased_gpu\nwith leased_gpu() as gpu: print(gpu)"
UUIDS = [f"MIG-GPU-{number:08x}/1/0" for number in range(4)]


def start(
    folder: Path, gpus: str, seconds: float, code: str = HOLD, runtime: Path | None = None, **variables: str
) -> subprocess.Popen[str]:
    own = {"CUDA_VISIBLE_DEVICES": gpus, "TMPDIR": str(folder), "PYTHONPATH": str(SCRIPTS)}
    if runtime:
        own["XDG_RUNTIME_DIR"] = str(runtime)
    environment = {**{key: value for key, value in os.environ.items() if key != "XDG_RUNTIME_DIR"}, **own, **variables}
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


def test_without_devices_there_is_no_lease(tmp_path: Path) -> None:
    output, _ = start(tmp_path, "", 0, PRINT).communicate(timeout=60)
    assert output.strip() == "None"
    assert not list(tmp_path.glob("seqmill-gpus-*"))


@pytest.mark.parametrize("gpu", ["3", "GPU-5a8f8f1e-0001-0002-0003-000000000000", UUIDS[0]])
def test_workers_take_turns_on_one_device(tmp_path: Path, gpu: str) -> None:
    workers = [start(tmp_path, gpu, 0.1) for _ in range(4)]  # each fails if another has the device
    for worker in workers:
        output, error = worker.communicate(timeout=60)
        assert (worker.returncode, output.strip()) == (0, gpu), error


def test_jobs_and_steps_of_slurm_that_count_from_0_have_different_devices(tmp_path: Path) -> None:
    """Each sees its own GPU as 0. Jobs differ by their number; steps of a job by the UUID that nvidia-smi tells."""
    path = os.environ["PATH"]
    for number, uuid in enumerate(GPU_UUIDS[:2]):
        (tmp_path / f"step{number}").mkdir()
        write_nvidia_smi(tmp_path / f"step{number}", [uuid])
    holder = start(tmp_path, "0", 60, PATH=f"{tmp_path}/step0:{path}", SLURM_JOB_ID="7")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "0\n"
    for step, job in ((1, "7"), (0, "8")):
        other = start(tmp_path, "0", 0, PRINT, PATH=f"{tmp_path}/step{step}:{path}", SLURM_JOB_ID=job)
        output, error = other.communicate(timeout=20)
        assert output == "0\n", error
    # The same GPU by its index, its UUID, and the beginning of its UUID.
    for name in ("0", GPU_UUIDS[0], GPU_UUIDS[0][:-1]):
        code = f"import logging\nlogging.basicConfig(level=logging.INFO)\n{PRINT}"
        waiter = start(tmp_path, name, 0, code, PATH=f"{tmp_path}/step0:{path}", SLURM_JOB_ID="7")
        assert waiter.stderr is not None
        assert f"GPU {name} is taken" in waiter.stderr.readline()
        waiter.kill()
        waiter.communicate()
    holder.kill()
    holder.communicate()


def test_a_worker_of_one_device_goes_on_without_a_lease(tmp_path: Path) -> None:
    """Where workers with several devices refuse: it has no choice to make."""
    precious = taken_over(tmp_path, "link")
    code = f"import logging\nlogging.basicConfig()\n{PRINT}"
    worker = start(tmp_path, "0", 0, code)
    output, error = worker.communicate(timeout=60)
    assert (worker.returncode, output) == (0, "0\n"), error
    assert f"{lease_folder(tmp_path)}: is not a folder of your own" in error
    assert "GPU 0 is used without a lease: other workers may share it" in error
    assert precious.read_text() == "the victim's"


def test_a_waiting_worker_says_so(tmp_path: Path) -> None:
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
    assert re.search(r"all 2 GPUs are taken .* waiting", error)


def lease_folder(folder: Path) -> Path:
    return folder / f"seqmill-gpus-{os.getuid()}-{socket.gethostname()}"


RUN = """
import sys
from seqmill.cli import program
from seqmill.embedding.lease import leased_gpu
def work():
    with leased_gpu() as gpu:
        print(gpu)
sys.exit(program.exit_code_of(work))
"""


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture(autouse=True)
def no_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def taken_over(tmp_path: Path, how: str) -> Path:
    """Occupy the path of the lease folder, as another user could; return a file of the victim."""
    precious, folder = tmp_path / "precious", lease_folder(tmp_path)
    precious.write_text("the victim's")
    if how == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        (tmp_path / "theirs/0.lock").symlink_to(precious)
        folder.symlink_to(tmp_path / "theirs")
        return precious
    folder.mkdir()
    (folder / "0.lock").symlink_to(precious)
    if how == "owner":
        folder.chmod(0o700)
        os.chown(folder, 65534, 65534)
    else:
        folder.chmod(0o777)
    return precious


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")


@pytest.mark.parametrize("how", ["link", "mode", pytest.param("owner", marks=needs_root)])
def test_a_folder_of_another_user_is_refused(tmp_path: Path, how: str) -> None:
    precious = taken_over(tmp_path, how)
    worker = start(tmp_path, "0,1", 0, RUN)
    output, error = worker.communicate(timeout=60)
    assert worker.returncode == 1, error
    assert output == ""
    assert len(error.splitlines()) == 1
    assert f"{lease_folder(tmp_path)}: " in error
    assert "TMPDIR" in error
    assert precious.read_text() == "the victim's"


def test_a_link_in_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    precious = taken_over(tmp_path, "mode")
    lease_folder(tmp_path).chmod(0o700)
    worker = start(tmp_path, "0,1", 0, RUN)
    _, error = worker.communicate(timeout=60)
    assert worker.returncode == 1, error
    assert str(lease_folder(tmp_path) / "0.lock") in error
    assert precious.read_text() == "the victim's"


def test_the_runtime_folder_is_used_if_the_other_is_taken(tmp_path: Path, runtime: Path) -> None:
    precious = taken_over(tmp_path, "link")
    first = start(tmp_path, "0,1", 60, runtime=runtime)
    assert first.stdout is not None
    assert first.stdout.readline() == "0\n"
    output, _ = start(tmp_path, "0,1", 0, RUN, runtime=runtime).communicate(timeout=60)
    assert output == "1\n"
    first.kill()
    first.communicate()
    assert precious.read_text() == "the victim's"


@pytest.mark.parametrize("with_runtime", ["first", "second", "both"])
def test_workers_with_and_without_a_runtime_folder_agree(tmp_path: Path, runtime: Path, with_runtime: str) -> None:
    """A login shell has a runtime folder, a cron job has none, and the last logout removes it."""
    first = start(tmp_path, "0,1", 60, runtime=None if with_runtime == "second" else runtime)
    assert first.stdout is not None
    assert first.stdout.readline() == "0\n"
    if with_runtime == "both":
        shutil.rmtree(runtime)
        runtime.mkdir(mode=0o700)
    second = start(tmp_path, "0,1", 0, RUN, runtime=None if with_runtime == "first" else runtime)
    assert second.communicate(timeout=60)[0] == "1\n"
    first.kill()
    first.communicate()


@pytest.mark.parametrize("state", ["absent", "open to others"])
def test_an_unusable_runtime_folder(tmp_path: Path, runtime: Path, state: str) -> None:
    runtime.rmdir() if state == "absent" else runtime.chmod(0o755)
    worker = start(tmp_path, "0,1", 0, RUN, runtime=runtime)
    output, error = worker.communicate(timeout=60)
    assert (worker.returncode, output) == (0, "0\n"), error
    assert not runtime.exists() or not list(runtime.iterdir())


@pytest.mark.parametrize("gpus", ["0,1", "0"])
def test_a_worker_without_locks_continues_and_says_so(tmp_path: Path, gpus: str) -> None:
    environment = preloaded(NO_LOCKS, tmp_path, LOCK_ERRNO=errno.ENOLCK)
    variables = {key: environment[key] for key in ("LD_PRELOAD", "LOCK_ERRNO")}
    worker = start(tmp_path, gpus, 0, RUN, **variables)
    output, error = worker.communicate(timeout=60)
    assert worker.returncode == 0, error
    assert output.strip() in gpus.split(",")
    assert error.count("has no locks") == 1
