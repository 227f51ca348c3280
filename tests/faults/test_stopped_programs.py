"""Signals that end a merge, an index build, or an export: no temporary file stays, and no partial result."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

from pipeline import DEMO, MODEL, SCRIPTS, Run
from seqmill.base.files import sha256_of_file
from sequences import random_sequences

SIGNAL_AT = Path(__file__).with_name("signal_at.py")
STOPS = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT")


def signal_at(number: str, event: str, pattern: str, count: int, program: str, *arguments: object) -> tuple[int, str]:
    """Run a program that gets a signal at an event; return its exit code and its log."""
    command = [sys.executable, SIGNAL_AT, number, event, pattern, count, SCRIPTS / program, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A merged result; the tests merge the same shards again, as float16."""
    folder = tmp_path_factory.mktemp("merged")
    fasta = folder / "some.faa"
    fasta.write_text("".join(f">id{n}\n{s}\n" for n, s in enumerate(random_sequences([300, 40, 50, 7]))))
    return Run(folder, 1).build(fasta).embed().merge()


@pytest.fixture
def run(merged: Run, tmp_path: Path) -> Run:
    shutil.copytree(merged.folder, tmp_path / "run")
    return Run(tmp_path / "run", 1)


def merge_arguments(run: Run) -> tuple[object, ...]:
    return ("--index", run.index, "--shards", *run.shards, "--output", run.embeddings, "--dtype", "float16")


def assert_stopped(number: str, code: int, said: str) -> None:
    assert code == 128 + signal.Signals[number], said
    assert "Traceback" not in said
    last = "stopped by Ctrl-C" if number == "SIGINT" else f"stopped by {number}"
    assert said.splitlines()[-1].endswith(last)


@pytest.mark.parametrize("number", STOPS)
def test_a_merge(number: str, run: Run) -> None:
    """Stopped just before it writes its rows: the earlier result is unchanged."""
    before = {path.name: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}
    written = r"/\.embeddings\.h5\..+\.tmp$"  # opened for its HDF5, then for its rows
    code, said = signal_at(number, "open", written, 2, "merge_shards.py", *merge_arguments(run))
    assert_stopped(number, code, said)
    assert {path.name: path.read_bytes() for path in run.folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("number", STOPS)
def test_a_build_of_an_index(number: str, tmp_path: Path) -> None:
    arguments = ("--fasta", DEMO, "--model", MODEL, "--output", tmp_path / "index.h5")
    code, said = signal_at(number, "open", r"/\.index\.h5\..+\.tmp$", 1, "build_index.py", *arguments)
    assert_stopped(number, code, said)
    assert list(tmp_path.iterdir()) == []


def test_an_export(run: Run, tmp_path: Path) -> None:
    arguments = ("--embeddings", run.embeddings, "--format", "npy", "--output", tmp_path / "e.npy")
    code, said = signal_at("SIGTERM", "open", r"/\.e\.npy\..+\.tmp$", 1, "export.py", *arguments)
    assert_stopped("SIGTERM", code, said)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


RENAMES = ("records.tsv.gz", "manifest.json", "embeddings.h5")


@pytest.mark.parametrize(
    ("event", "name"), [("os.remove", "embeddings.h5"), *(("os.rename", name) for name in RENAMES)]
)
def test_a_merge_killed_over_an_earlier_result(event: str, name: str, run: Run) -> None:
    """SIGKILL just before each step that changes a final name: if embeddings.h5 exists, the others belong to it."""
    code, said = signal_at("SIGKILL", event, f"/{name}$", 1, "merge_shards.py", *merge_arguments(run))
    assert code == -signal.SIGKILL, said
    assert run.embeddings.exists() == (event == "os.remove")
    if run.embeddings.exists():
        assert_of_one_result(run, "float32")
    assert_of_one_result(run.merge("float16"), "float16")
    assert list(run.folder.glob(".*.tmp")) == []


@pytest.mark.parametrize("name", RENAMES)
def test_a_merge_stopped_during_its_renames_finishes_them(name: str, run: Run) -> None:
    code, said = signal_at("SIGTERM", "os.rename", f"/{name}$", 1, "merge_shards.py", *merge_arguments(run))
    assert_stopped("SIGTERM", code, said)
    assert_of_one_result(run, "float16")
    assert list(run.folder.glob(".*.tmp")) == []


def assert_of_one_result(run: Run, dtype: str) -> None:
    outputs = json.loads((run.folder / "manifest.json").read_text())["outputs"]
    with h5py.File(run.embeddings) as file:
        assert file["embeddings"].dtype == dtype
        digest = hashlib.sha256(file["embeddings"][:].tobytes()).hexdigest()
    assert outputs["embeddings.h5"]["embeddings_sha256"] == digest
    assert outputs["records.tsv.gz"]["sha256"] == sha256_of_file(run.folder / "records.tsv.gz")
