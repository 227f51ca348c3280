"""Real workers on a machine whose nvidia-smi lists GPUs, with a torch that has no CUDA."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fake_gpus import COMPUTE_ON_CPU, UUIDS, write_nvidia_smi
from pipeline import MODEL, REPOSITORY, SCRIPTS, Run
from sequences import random_sequences

LINE = re.compile(r"^(\d\d:\d\d:\d\d) INFO GPU (\S+) ")
NO_CUDA = f"driver 535.104.05, torch {torch.__version__} with no CUDA: it is a CPU build"
pytestmark = pytest.mark.skipif(bool(torch.version.cuda), reason="torch has CUDA")


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The environment on a machine with one GPU and an old driver; its leases are the test's own."""
    (tmp_path / "bin").mkdir()
    write_nvidia_smi(tmp_path / "bin", UUIDS[:1], "535.104.05")
    dropped = ("CUDA_VISIBLE_DEVICES", "XDG_RUNTIME_DIR", "SLURM_JOB_ID")
    variables = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**variables, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}


def write_fasta(folder: Path) -> Path:
    fasta = folder / "p.faa"
    fasta.write_text("".join(f">id{n}\n{s}\n" for n, s in enumerate(random_sequences([12] * 40))))
    return fasta


def start(run: Run, rank: int, environment: dict[str, str], *options: str) -> subprocess.Popen[str]:
    shard, status = run.shards[rank], run.statuses[rank]
    command = [sys.executable, str(SCRIPTS / "embed_shard.py"), "--index", str(run.index), "--rank", str(rank)]
    command += ["--world-size", str(run.world_size), "--output", str(shard), "--status", str(status), *options]
    return subprocess.Popen(
        [*command, "--audit-seconds", "0"], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_workers_started_by_hand_take_turns_on_the_only_gpu(tmp_path: Path, machine: dict[str, str]) -> None:
    run = Run(tmp_path / "run", 3).build(write_fasta(tmp_path))
    workers = [start(run, rank, {**machine, "PYTHONPATH": COMPUTE_ON_CPU}) for rank in range(3)]
    times = []
    for worker in workers:
        _, log = worker.communicate(timeout=120)
        assert worker.returncode == 0, log
        leases = [found.groups() for line in log.splitlines() if (found := LINE.match(line)) and "taken" not in line]
        (began, gpu, *_), (ended, *_) = leases
        assert gpu == "0,"  # the only one visible
        times.append((began, ended))
    for (_, ended), (began, _) in pairwise(sorted(times)):
        assert ended <= began
    assert [path.name for path in tmp_path.glob("seqmill-gpus-*/*")] == [f"{UUIDS[0]}.lock"]


def test_a_worker_fails_and_names_driver_and_wheel_but_computes_with_device_cpu(
    tmp_path: Path, machine: dict[str, str]
) -> None:
    run = Run(tmp_path / "run", 1).build(write_fasta(tmp_path))
    _, log = (worker := start(run, 0, machine)).communicate(timeout=120)
    assert worker.returncode == 1, log
    status = json.loads(run.statuses[0].read_text())
    assert (status["status"], status["error"]["type"]) == ("failed", "SeqmillError")
    assert NO_CUDA in status["error"]["message"]
    assert NO_CUDA in log.splitlines()[-1]
    assert "Traceback" not in log
    _, log = (worker := start(run, 0, machine, "--device", "cpu")).communicate(timeout=120)
    assert worker.returncode == 0, log
    assert "GPU" not in log


def test_the_workflow_ends_with_that_line_instead_of_one_slow_thread(tmp_path: Path, machine: dict[str, str]) -> None:
    fasta = write_fasta(tmp_path)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile"), "--cores", "2"]
    command += ["--directory", str(tmp_path), "--retries", "0", "--config", f"fasta={fasta}", f"model={MODEL}"]
    done = subprocess.run(command, cwd=REPOSITORY, env=machine, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("  p/")]  # the summary at the end
    assert NO_CUDA in error
    assert error.endswith("or use device cpu")
    (status,) = (tmp_path / "results").rglob("*.status.json")
    assert json.loads(status.read_text())["status"] == "failed"
