"""The doctor names downloads of weights that have failed, until the weights are on this disk."""

import os
from pathlib import Path

import msgspec
import pytest

from seqmill.cli.doctor import describe
from seqmill.run.doctor import examine
from seqmill.spec.released import read_releases
from seqmill.store.status import RUNNING, ShardStatus

ESM2, DNABERT = "esm2_t6_8M_UR50D", "dnabert_s"
ERROR = "cannot fetch https://h/w.pt: no such host. Run `seqmill fetch w` where there is internet"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of the workflow, in which no run has begun."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".snakemake").mkdir()
    for model in (ESM2, DNABERT):
        write(tmp_path / f"logs/fetch_weights/{model}.log", f"10:00:00 INFO fetching\n10:00:01 ERROR {ERROR}\n")
    write(tmp_path / "logs/fetch_weights/another.log", "10:00:01 ERROR of no released model\n")
    return tmp_path


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def said(folder: str = "results") -> list[str]:
    return describe(examine(Path(folder)), checked=False)


@pytest.mark.parametrize("folder", ["results", ".", "results/tiny", f"results/tiny/{ESM2}"])
def test_each_run_of_the_model_tells_it(root: Path, folder: str) -> None:
    (root / f"results/tiny/{ESM2}/shards").mkdir(parents=True)
    (root / f"logs/tiny/{ESM2}").mkdir(parents=True)
    first, *lines = said(folder)
    assert first == f"tiny/{ESM2}: failed"
    assert lines[0] == f"  weights: not fetched: {ERROR}\n    see logs/fetch_weights/{ESM2}.log"
    assert any(line.startswith("first: ") and line.endswith("fix what the error says") for line in lines)
    assert lines[-1].startswith("next: ")
    assert "snakemake --cores all" in lines[-1]
    assert any(line.startswith(f"weights of {DNABERT}") for line in lines) == (folder in ("results", "."))

    write(root / f"resources/models/{ESM2}.pt")
    first, *lines = said(folder)
    assert first == f"tiny/{ESM2}: not complete"
    assert not any(f"fetch_weights/{ESM2}.log" in line for line in lines)


def test_it_is_told_without_any_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("results", "."):
        lines = said(folder)
        finding = f"  weights: not fetched: {ERROR}\n    see logs/fetch_weights/"
        assert lines[:4] == [
            f"weights of {ESM2}: failed", f"{finding}{ESM2}.log",
            f"weights of {DNABERT}: failed", f"{finding}{DNABERT}.log",
        ]  # fmt: skip
        assert f"first: weights of {ESM2}: fix what the error says" in lines
        assert "snakemake --cores all" in lines[-1]
    write(root / f"logs/fetch_weights/{ESM2}.log", "10:00:00 INFO fetching again\n")
    monkeypatch.setenv("SEQMILL_MODELS", str(root / "models"))
    for name in read_releases()[DNABERT].files:
        assert said()[0] == f"weights of {DNABERT}: failed"
        write(root / "models" / DNABERT / name)
    assert examine(Path("results")) == []


def test_it_is_not_told_once_shards_have_begun(root: Path) -> None:
    """The weights have been put elsewhere, and their path given as the model."""
    shards = root / f"results/tiny/{ESM2}/shards"
    running = msgspec.json.encode(ShardStatus(1, 2, RUNNING, "shard_1-of-2.h5")).decode()
    status = write(shards / "shard_1-of-2.status.json", running)
    os.utime(status, (0, 0))
    assert "weights: not fetched" in said(f"results/tiny/{ESM2}")[1]
    os.utime(root / f"logs/fetch_weights/{ESM2}.log", (0, 0))
    os.utime(status)
    assert not any("weights: " in line for line in said(f"results/tiny/{ESM2}"))
