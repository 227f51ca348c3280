"""SLURM jobs that a killed run has left are known by their run, and cancelled if no other run is alive."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import SCRIPTS
from seqmill.errors import SeqmillError
from seqmill.run.slurm_jobs import cancel_orphans, claim_folder, stop_orphans

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


def test_a_run_cancels_orphans_only_if_no_other_run_is_alive(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with claim_folder(folder)[0], stop_orphans(folder):
        assert not (folder / "cancelled").exists()
    with stop_orphans(folder):
        assert (folder / "cancelled").read_text() == "8 9\n"
        assert not claim_folder(folder)[1]
    assert capsys.readouterr().err == "Cancelled SLURM jobs of an earlier run in this folder: 8 9\n"


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
    code = "import sys; from pathlib import Path; from seqmill.run.slurm_jobs import claim_folder\n"
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
    monkeypatch.setattr("seqmill.run.slurm_jobs.WAIT_SECONDS", 0)
    with pytest.raises(SeqmillError, match="do not end: 8 9; wait"):
        cancel_orphans(folder)


def test_without_slurm_there_are_no_orphans(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert cancel_orphans(folder) == []
