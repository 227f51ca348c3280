"""What jobs ask a cluster for grows with the model, the tokens and the attempt; orphans are known by their run."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import DEMO, MODEL, SCRIPTS, Run
from seqpack.errors import SeqpackError
from seqpack.models.registry import MODELS, ModelSource, find_model
from seqpack.orphans import cancel_orphans, claim_folder
from seqpack.resources import memory_mb, runtime_minutes, tokens_in

# As published with the models: the numbers in their names (fair-esm's README), with the language-model head.
PUBLISHED = {"8M": 8e6, "35M": 35e6, "150M": 150e6, "650M": 650e6, "3B": 3e9, "15B": 15e9}


@pytest.mark.parametrize("name", MODELS)
def test_weights_fit_twice_in_float32(name: str) -> None:
    source = find_model(name)
    weights_mb = 4 * PUBLISHED[name.split("_")[2]] / 1e6
    assert memory_mb(source, 1) > 1.8 * weights_mb + 5000
    assert memory_mb(source, 2) == pytest.approx(1.5 * memory_mb(source, 1), abs=2)


def test_time_grows_with_everything_that_takes_time() -> None:
    def minutes(
        model: str = "esm2_t33_650M_UR50D",
        num_tokens: int = 10**8,
        max_tokens: int = 1024,
        precision: str = "auto",
        on_gpu: bool = True,
        threads: int = 8,
        attempt: int = 1,
    ) -> int:
        return runtime_minutes(find_model(model), num_tokens, max_tokens, precision, on_gpu, threads, attempt)

    assert minutes() < minutes(model="esm2_t36_3B_UR50D")
    assert minutes() < minutes(num_tokens=2 * 10**8)
    assert minutes() < minutes(max_tokens=4096)
    assert minutes() < minutes(precision="float32")
    assert minutes() < minutes(on_gpu=False)
    assert minutes(on_gpu=False, threads=16) < minutes(on_gpu=False)
    assert minutes(attempt=2) == 2 * minutes()
    assert 0 < minutes(num_tokens=0) < minutes()


def test_tokens_are_those_of_the_index_or_at_least_those_of_the_fasta(tmp_path: Path) -> None:
    run = Run(tmp_path, 1)
    before = tokens_in(run.index, DEMO)
    compressed = tmp_path / "demo.faa.gz"
    compressed.write_bytes(gzip.compress(DEMO.read_bytes()))
    run.build(DEMO)
    tokens = tokens_in(run.index, DEMO)
    assert tokens == 20676  # 20,518 residues, and two more of each of 79 sequences
    assert before >= tokens
    assert tokens_in(tmp_path / "none.h5", compressed) >= tokens
    assert tokens_in(tmp_path / "none.h5", tmp_path / "none.faa") == 0
    run.index.write_bytes(b"no HDF5")
    assert tokens_in(run.index, DEMO) == before
    run.index.unlink()
    run.build(DEMO)
    assert tokens_in(run.index, DEMO) == tokens


def test_weights_of_unknown_size_are_judged_by_their_files(tmp_path: Path) -> None:
    path = tmp_path / "own.pt"
    with path.open("wb") as file:
        file.truncate(2_600_000_000)  # 650 million in float32
    own, known = ModelSource("own.pt", "checkpoint", None, path), find_model("esm2_t33_650M_UR50D")
    assert memory_mb(own, 1) >= memory_mb(known, 1)
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / "model.safetensors")
    assert memory_mb(ModelSource("folder", "folder", None, folder), 1) == memory_mb(
        ModelSource("own.pt", "checkpoint", None, folder / "model.safetensors"), 1
    )
    assert memory_mb(find_model(MODEL), 1) < memory_mb(known, 1)


SQUEUE = """#!/bin/sh
case "$*" in *--name=aaaa-1,bbbb-2*) ;; *) exit 2;; esac
if test -e {folder}/deaf; then rm {folder}/deaf; echo 'Socket timed out' >&2; exit 1; fi
test -e {folder}/cancelled && test ! -e {folder}/stuck && exit 0
echo 8; echo 8; echo 9
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the logs of two runs, and stand-ins for SLURM's commands; the real ones are in tests/slurm."""
    logs = tmp_path / ".snakemake/log"
    logs.mkdir(parents=True)
    for number, run in enumerate(("aaaa-1", "bbbb-2")):
        (logs / f"{number}.snakemake.log").write_text(f"Building DAG of jobs...\nSLURM run ID: {run}\nUsing shell\n")
    (logs / "local.snakemake.log").write_text("Building DAG of jobs...\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "squeue").write_text(SQUEUE.format(folder=tmp_path))
    (programs / "scancel").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/cancelled\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_only_jobs_of_runs_in_this_folder_are_cancelled(folder: Path) -> None:
    assert cancel_orphans(folder) == ["8", "9"]
    assert (folder / "cancelled").read_text() == "8 9\n"
    assert cancel_orphans(folder) == []


def test_a_squeue_that_fails_is_asked_again(folder: Path) -> None:
    (folder / "deaf").touch()
    assert cancel_orphans(folder) == ["8", "9"]


def test_a_copy_of_a_folder_leaves_the_jobs_of_the_original_alone(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    claim_folder(folder)[0].close()
    copy = tmp_path_factory.mktemp("copy") / "of it"
    shutil.copytree(folder, copy)
    claim_folder(copy)[0].close()
    assert cancel_orphans(copy) == []
    assert not (folder / "cancelled").exists()
    assert cancel_orphans(folder) == ["8", "9"]


def test_a_second_run_in_the_folder_knows_of_the_first(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from seqpack.orphans import claim_folder\n"
    code += "file, alone = claim_folder(Path(sys.argv[1])); print(alone, flush=True); sys.stdin.read()"

    def run() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(tmp_path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(SCRIPTS)}, text=True, **pipes)

    first, second = run(), None
    assert first.stdout.readline() == "True\n"
    second = run()
    assert second.stdout.readline() == "False\n"
    first.kill()
    first.wait()
    third = run()
    assert third.stdout.readline() == "False\n"  # the second lives
    for process in (second, third):
        process.kill()
        process.wait()
    last = run()
    assert last.communicate("")[0] == "True\n"


def test_jobs_that_do_not_end_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "stuck").touch()
    monkeypatch.setattr("seqpack.orphans.WAIT_SECONDS", 0)
    with pytest.raises(SeqpackError, match="do not end: 8 9; wait"):
        cancel_orphans(folder)


def test_without_slurm_there_are_no_orphans(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert cancel_orphans(folder) == []
