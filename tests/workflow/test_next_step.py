"""The doctor's next step, pasted into a shell in another folder, finishes a broken result of `seqmill run`."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline import MODEL, SCRIPTS
from sequences import random_sequences

RESULTS = Path("results/tiny/untrained-esm2_t6_8M_UR50D")


def run(command: Sequence[object], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a user whose PATH has neither seqmill nor Snakemake."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)


def seqmill(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "seqmill", *arguments], folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a finished run, which was started in the folder above."""
    folder = tmp_path_factory.mktemp("where the command was given")
    for name, seed in (("tiny", 1), ("other", 2)):
        sequences = random_sequences([40, 30, 60], seed)
        (folder / f"{name}.faa").write_text("".join(f">p{n}\n{text}\n" for n, text in enumerate(sequences)))
    for name, shards in (("tiny", 2), ("other", 1)):  # the doctor must not propose the last command for the first
        arguments = [f"{name}.faa", "--model", MODEL, "--config", f"shards={shards}", "audit_seconds=0"]
        done = seqmill(folder, "run", *arguments, "--output", "my out", "--", "--retries", "0")
        assert done.returncode == 0, done.stderr
        assert f", e.g. {sys.executable} {SCRIPTS}/run.py " in done.stdout  # not `seqmill run`, as for the user's PATH
    return folder / "my out"


def finish(root: Path, tmp_path: Path) -> tuple[str, str]:
    """Paste the doctor's next step; return what the doctor said and the output of the step."""
    said = seqmill(root.parent, "doctor", root / "results").stdout
    line = said.splitlines()[-1].removeprefix("next: ")
    done = run(["bash", "-c", line], tmp_path)
    assert done.returncode == 0, done.stderr
    now = seqmill(root.parent, "doctor", root / "results")
    assert now.returncode == 0, now.stdout
    assert now.stdout.count(": complete\n") == 2
    assert list(tmp_path.iterdir()) == []
    return said, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["embeddings.h5", "shards/shard_1-of-2.h5", "index.h5"])
def test_a_missing_file(root: Path, tmp_path: Path, name: str) -> None:
    (root / RESULTS / name).unlink()
    if name != "embeddings.h5":
        (root / RESULTS / "embeddings.h5").unlink()
    said, output = finish(root, tmp_path)
    assert "first: " not in said
    assert ("rule build_index" in output) == (name == "index.h5")


def test_a_damaged_file(root: Path, tmp_path: Path) -> None:
    os.truncate(root / RESULTS / "embeddings.h5", 100)
    said, _ = finish(root, tmp_path)
    assert "\nnext: rm '" in said


def test_the_locks_of_a_killed_snakemake(root: Path, tmp_path: Path) -> None:
    (root / RESULTS / "embeddings.h5").unlink()
    locks = root / ".snakemake/locks"
    locks.mkdir(exist_ok=True)
    (locks / "0.output.lock").write_text(f"{RESULTS}/embeddings.h5\n")
    said, _ = finish(root, tmp_path)
    assert "first: make sure that no snakemake is running there any more\n" in said
    assert "--unlock" in said


def test_a_failed_worker(root: Path, tmp_path: Path) -> None:
    """The cause is removed as the doctor says first; here there is none any more."""
    (root / RESULTS / "embeddings.h5").unlink()
    log = root / "logs/tiny/untrained-esm2_t6_8M_UR50D/merge_shards.log"
    log.write_text("10:00:01 ERROR the disk is full\n")
    said, _ = finish(root, tmp_path)
    assert "first: tiny/untrained-esm2_t6_8M_UR50D: fix what the error says\n" in said
