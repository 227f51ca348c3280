"""A worker in float8, emulated on the CPU by lifting the check of the device: its audit, its files, its refusals."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from families import PROTEINS, SMALL_ESM2, WINDOWS, Family, broken_model, write_fasta
from pipeline import Run
from product_outliers import plant_product_outliers
from seqmill import open_embeddings
from seqmill.embedding import device
from seqmill.errors import SeqmillError
from seqmill.model.esm2_weights import save_checkpoint
from seqmill.model.weights import untrained_tensors
from seqmill.spec.fingerprint import Fingerprint
from sequences import random_sequences

LENGTHS = [200, 128, 64, 64, 40, 33]


@pytest.fixture(autouse=True)
def _any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_why_no_float8", lambda _: "")


def embedded(folder: Path, factor: float) -> Run:
    """Embed proteins with seeded weights that have outliers `factor` times as large; audit all that can be."""
    weights = plant_product_outliers(SMALL_ESM2, untrained_tensors(SMALL_ESM2), factor)
    parts = {name: list(t.chunk(3) if ".qkv." in name else [t]) for name, t in weights.items()}
    save_checkpoint(SMALL_ESM2, parts, folder / "model.pt")
    run = Run(folder, 1).build(write_fasta(folder / "in.faa", random_sequences(LENGTHS)), str(folder / "model.pt"))
    return run.embed("float8", audit_seconds=3600)


@pytest.mark.parametrize("factor", [1, 1000])
def test_the_audit_accepts_float8(factor: float, tmp_path: Path) -> None:
    run = embedded(tmp_path, factor).merge()
    status = json.loads(run.statuses[0].read_text())
    print(status["audit"])
    assert status["audit"]["verdict"] == "ok"
    assert status["audit"]["worst_relative_error"] > 0.01  # it was float8
    assert Fingerprint.from_attributes(status["fingerprint"]).precision == status["run"]["precision"] == "float8"
    assert open_embeddings(run.embeddings).attrs["precision"] == "float8"


def test_outliers_too_large_for_float8_are_refused(tmp_path: Path) -> None:
    """In float32 they change nothing: the weights compute the same function."""
    run = embedded(tmp_path, 1e6)
    audit = json.loads(run.statuses[0].read_text())["audit"]
    print(audit)
    assert audit["verdict"] == "fail"
    with pytest.raises(SeqmillError, match=r"its audit failed, the embeddings are wrong"):
        run.merge()
    run.embed("float32", audit_seconds=3600).merge()


@pytest.mark.parametrize("family", [PROTEINS, WINDOWS], ids=str)
def test_the_sequences_that_are_not_finite_are_left_out_and_no_others(family: Family, tmp_path: Path) -> None:
    """They are those of float32. A conversion that saturates would make them finite."""
    rows = {}
    for precision in ("float32", "float8"):
        folder = tmp_path / precision
        folder.mkdir()
        run = Run(folder, 1).build(family.write_odd(folder), broken_model(family, folder, np.inf), family.policy)
        run.embed(precision, on_error="skip")
        with h5py.File(run.shards[0]) as shard:
            rows[precision] = shard["index_rows"][:].tolist()
            assert np.isfinite(shard["embeddings"][:]).all()
    assert rows["float8"] == rows["float32"]
    assert 0 < len(rows["float8"]) < len(set(family.sequences))
