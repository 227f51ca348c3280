"""Input that can be read only once, or never ends, is refused; no program waits forever for another."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import MODEL, SCRIPTS, run_script
from seqmill.run.slurm_jobs import IN_USE

HANGS = 60  # seconds; a program that hangs ends with a TimeoutExpired
LOOKS = {
    "dataset": "from seqmill.run.datasets import dataset_of_file; dataset_of_file(path, 'esm2_t6_8M_UR50D', [Path()])",
    "metadata": "from seqmill.report.colors import require_column; require_column(Path(path), 'kind')",
    "reuse": "from seqmill.store.reuse import open_source; open_source(Path(path))",
}
PROGRAM = """
import sys
from pathlib import Path
from seqmill.cli import program
path = sys.argv[1]
def work():
    {}
sys.exit(program.exit_code_of(work))
"""


def run(code: str, argument: object, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    command = [sys.executable, "-c", PROGRAM.format(code), str(argument)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS, **options)


def assert_refused(done: subprocess.CompletedProcess[str], path: object) -> None:
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert f"{path}: is a pipe, a device or a socket" in line
    assert "file" in line


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "a.fasta")
    return tmp_path / "a.fasta"


@pytest.mark.parametrize("what", LOOKS)
def test_a_pipe_is_refused(pipe: Path, what: str) -> None:
    assert_refused(run(LOOKS[what], pipe), pipe)


def test_no_index_is_built_from_a_pipe(pipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "results/index.h5"
    for path, text in ((pipe, None), ("/dev/stdin", ">a\nMKV\n"), ("/dev/zero", None)):
        arguments = ("--fasta", path, "--model", MODEL, "--output", output)
        assert_refused(run_script("build_index.py", *arguments, input=text, timeout=HANGS), path)
    assert not output.exists()


def test_a_workflow_whose_folder_is_in_use_names_the_lock_holder(tmp_path: Path) -> None:
    path = tmp_path / IN_USE
    path.parent.mkdir()
    holder = f"import fcntl, time; f = open({str(path)!r}, 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True)"
    command = [sys.executable, "-c", f"{holder}; time.sleep(600)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        code = "from seqmill.run import slurm_jobs; slurm_jobs.CLAIM_SECONDS = 0.2; slurm_jobs.claim_folder(Path(path))"
        try:
            done = run(code, tmp_path)
        finally:
            other.kill()
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert str(path) in line
    assert f"process {other.pid} (" in line


def test_a_workflow_waits_briefly_for_its_folder(tmp_path: Path) -> None:
    path = tmp_path / IN_USE
    path.parent.mkdir()
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code = "from seqmill.run import slurm_jobs; print(slurm_jobs.claim_folder(Path(path))[1])"
        environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
        command = [sys.executable, "-c", PROGRAM.format(code), str(tmp_path)]
        with subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE) as second:
            while str(path) not in open_files(second.pid):
                assert second.poll() is None
            fcntl.flock(file, fcntl.LOCK_UN)
            assert second.communicate(timeout=HANGS)[0] in ("True\n", "False\n")
    assert second.returncode == 0


def open_files(process: int) -> set[str]:
    try:
        return {str(link.readlink()) for link in Path(f"/proc/{process}/fd").iterdir()}
    except OSError:
        return set()
