"""Sequences without a finite embedding: in float32 again, then left out by name or a failure by name."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import Run
from reference import fair_esm_model, save_checkpoint
from seqpack import open_embeddings
from seqpack.errors import SeqpackError
from seqpack.models.registry import MODELS
from seqpack.worker import ShardTask, embed_shard
from sequences import random_sequences

CYSTEINE = 23  # its token in ESM-2's alphabet


def checkpoint(folder: Path, **values: float) -> Path:
    """Weights whose embedding of cysteine is NaN, or whose first fc1 grows with it."""
    model = fair_esm_model(MODELS["esm2_t6_8M_UR50D"])
    with torch.no_grad():
        model.embed_tokens.weight[CYSTEINE] = values["cysteine"]
    return save_checkpoint(model, folder / "weights.pt")


def write(path: Path, sequences: list[str]) -> Path:
    path.write_text("".join(f">record{number}\n{sequence}\n" for number, sequence in enumerate(sequences, 1)))
    return path


@pytest.fixture
def sequences() -> list[str]:
    plain = [s.replace("C", "A") for s in random_sequences([50, 30, 400, 50, 3])]
    return [*plain[:2], "MKCV", *plain[2:], "MKCV", "CCC", plain[0]]


def task_of(run: Run, rank: int, **settings: object) -> ShardTask:
    task = ShardTask(run.index, rank, run.world_size, run.shards[rank], run.statuses[rank], device="cpu")
    return replace(task, precision="float32", audit_seconds=0, **settings)


def test_fail_names_them_and_keeps_the_rest(tmp_path: Path, sequences: list[str]) -> None:
    run = Run(tmp_path, 1).build(write(tmp_path / "f.faa", sequences), str(checkpoint(tmp_path, cysteine=float("nan"))))
    with pytest.raises(SeqpackError, match=r"2 sequences have no finite embedding.*'record3' \(record 3\)"):
        embed_shard(task_of(run, 0))
    status = json.loads(run.statuses[0].read_text())
    assert status["status"] == "failed"
    assert status["quarantined"]["num_sequences"] == 2
    assert not run.shards[0].exists()
    assert list((tmp_path / "parts").glob("*.part.h5"))
    embed_shard(task_of(run, 0, on_error="skip"))
    assert json.loads(run.statuses[0].read_text())["resumed_packs"] > 0


@pytest.mark.parametrize("world_size", [1, 3])
def test_skip_leaves_them_out_and_says_so_everywhere(
    tmp_path: Path, sequences: list[str], world_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    weights = checkpoint(tmp_path, cysteine=float("nan"))
    run = Run(tmp_path, world_size).build(write(tmp_path / "f.faa", sequences), str(weights))
    for rank in range(world_size):
        embed_shard(task_of(run, rank, on_error="skip"))
    run.merge()
    assert "3 RECORDS ARE QUARANTINED" in caplog.text
    found = open_embeddings(run.embeddings)
    assert found.ids == [f"record{number}" for number in (1, 2, 4, 5, 6, 9)]
    assert np.isfinite(found[:]).all()
    assert (found["record1"] == found["record9"]).all()
    fates = {"embedded": 5, "truncated": 0, "duplicate": 1, "rejected": 0, "quarantined": 3}
    assert json.loads(found.attrs["fate_counts"]) == run.manifest["counts"]["fates"] == fates
    assert sum(fates.values()) == len(sequences) == found.attrs["num_records"]
    table = gzip.decompress((tmp_path / "records.tsv.gz").read_bytes()).decode()
    rows = [line.split("\t") for line in table.splitlines()[1:]]
    assert [(row[4], row[5]) for row in rows] == [
        ("embedded", "0"),
        ("embedded", "1"),
        ("quarantined", ""),
        ("embedded", "2"),
        ("embedded", "3"),
        ("embedded", "4"),
        ("quarantined", ""),
        ("quarantined", ""),
        ("duplicate", "5"),
    ]
    assert all("not finite" in row[7] for row in rows if row[4] == "quarantined")


def test_sequences_that_are_finite_alone_are_the_same_with_and_without_the_bad(
    tmp_path: Path, sequences: list[str]
) -> None:
    good = [sequence for sequence in sequences if "C" not in sequence]
    weights = str(checkpoint(tmp_path, cysteine=float("nan")))
    values = []
    for name, these in (("all", sequences), ("good", good)):
        (tmp_path / name).mkdir()
        run = Run(tmp_path / name, 1).build(write(tmp_path / name / "f.faa", these), weights)
        embed_shard(task_of(run, 0, on_error="skip"))
        values.append(open_embeddings(run.merge().embeddings)[:])
    np.testing.assert_allclose(values[0], values[1], rtol=0, atol=1e-6)


def test_half_precision_that_overflows_is_computed_in_float32(tmp_path: Path, sequences: list[str]) -> None:
    """Cysteine's norm output is 17.9 x 5000 in one channel, beyond 65,504; the others' is a few times 5000."""
    model = fair_esm_model(MODELS["esm2_t6_8M_UR50D"])
    with torch.no_grad():
        model.embed_tokens.weight[CYSTEINE] = 0
        model.embed_tokens.weight[CYSTEINE, 0] = 1e4  # the norm makes it about sqrt(320)
        model.layers[0].final_layer_norm.weight[0] = 5e3
    weights = save_checkpoint(model, tmp_path / "weights.pt")
    run = Run(tmp_path, 1).build(write(tmp_path / "f.faa", sequences), str(weights))
    embed_shard(replace(task_of(run, 0), precision="float16"))
    half = open_embeddings(run.merge().embeddings)
    assert json.loads(run.statuses[0].read_text())["run"]["recomputed_float32"] == 2
    for path in (*run.shards, *run.statuses):
        path.unlink()
    embed_shard(task_of(run, 0))
    exact = open_embeddings(run.merge().embeddings)
    for number, sequence in enumerate(sequences):
        error = np.abs(half[number] - exact[number]).max() / np.abs(exact[number]).max()
        assert error < (1e-5 if "C" in sequence else 0.05)
        assert (error > 1e-5) == ("C" not in sequence)


def test_weights_that_are_all_wrong_end_early(tmp_path: Path) -> None:
    """Not after the whole FASTA has been computed twice."""
    weights = checkpoint(tmp_path, cysteine=float("inf"))
    fasta = write(tmp_path / "f.faa", ["C" + s for s in random_sequences([40] * 1500)])
    run = Run(tmp_path, 1).build(fasta, str(weights))
    with pytest.raises(SeqpackError, match=r"have no finite embedding.*after [0-9] of \d\d packs: check the weights"):
        embed_shard(task_of(run, 0))
