"""Sequences without a finite embedding: recomputed in float32, then left out or refused by name."""

import csv
import gzip
import json
import math
import re
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

from dnabert_reference import save_folder, seeded_state
from families import (
    CYSTEINE,
    ESMC,
    ONE_EACH,
    PROTEINS,
    SMALL,
    UNKNOWN,
    WINDOWS,
    Family,
    broken_model,
    changed_model,
)
from pipeline import Run
from reference import fair_esm_model, save_checkpoint
from seqmill import open_embeddings
from seqmill.embedding.embedder import DoesNotFit
from seqmill.embedding.finite import FiniteResults
from seqmill.embedding.readout import NO_RESIDUES, Readout
from seqmill.errors import SeqmillError
from seqmill.spec.models import MODELS
from seqmill.spec.outputs import Outputs
from seqmill.store.index import open_index

CHANNEL, UNIT = 5, 7


def overflowing_model(family: Family, folder: Path) -> str:
    """Weights that overflow float16 at every cysteine, or at every N."""
    if family is PROTEINS:
        model = fair_esm_model(MODELS["esm2_t6_8M_UR50D"])
        # Cysteine's norm output is 17.9 x 5000 in one channel, beyond 65,504; the others' is a few times 5000.
        with torch.no_grad():
            model.embed_tokens.weight[CYSTEINE] = 0
            model.embed_tokens.weight[CYSTEINE, 0] = 1e4  # the norm makes it about sqrt(320)
            model.layers[0].final_layer_norm.weight[0] = 5e3
        return str(save_checkpoint(model, folder / "weights.pt"))
    if family is ESMC:
        return changed_model(family, folder, overflow_gate_of_esmc)
    # One hidden unit of the first layer is about (8 x 300) ** 2 at N, and its output weights are 0: this changes
    # nothing in float32, but in float16 it is infinite, and infinity times 0 is NaN. Attention adds 0 to its channel.
    state = seeded_state(SMALL)
    state["embeddings.word_embeddings.weight"][:, CHANNEL] = 0
    state["embeddings.word_embeddings.weight"][UNKNOWN, CHANNEL] = 100
    layer = "encoder.layer.0."
    for kind in ("weight", "bias"):
        state[f"{layer}attention.output.dense.{kind}"][CHANNEL] = 0
    gate_and_value = [UNIT, 4 * SMALL.hidden_dim + UNIT]
    state[f"{layer}mlp.gated_layers.weight"][gate_and_value] = 0
    state[f"{layer}mlp.gated_layers.weight"][gate_and_value, CHANNEL] = 300
    state[f"{layer}mlp.wo.weight"][:, UNIT] = 0
    return str(save_folder(state, SMALL, folder / "weights"))


def overflow_gate_of_esmc(state: dict[str, torch.Tensor]) -> None:
    """As below for DNABERT-S."""
    state["embed_tokens.weight"][:, CHANNEL] = 0
    state["embed_tokens.weight"][CYSTEINE, CHANNEL] = 100
    state["layers.0.self_attn.o_proj.weight"][CHANNEL] = 0
    for name in ("gate_proj", "up_proj"):
        state[f"layers.0.mlp.{name}.weight"][UNIT] = 0
        state[f"layers.0.mlp.{name}.weight"][UNIT, CHANNEL] = 300
    state["layers.0.mlp.down_proj.weight"][:, UNIT] = 0


def write(path: Path, sequences: list[str]) -> Path:
    path.write_text("".join(f">record{number}\n{sequence}\n" for number, sequence in enumerate(sequences, 1)))
    return path


@pytest.fixture(params=ONE_EACH, ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def is_bad(family: Family, sequence: str) -> bool:
    """Return whether the sequence has the letter at which the weights above are broken."""
    return ("C" if family.is_protein else "N") in sequence


@pytest.fixture
def sequences(family: Family) -> list[str]:
    """Nine: the third, the seventh (equal to the third), and the eighth are bad; the ninth equals the first."""
    if family.is_protein:
        plain = [s.replace("C", "A") for s in family.random([50, 30, 400, 50, 3])]
        bad, another = "MKCV", "CCC"
    else:  # the last is windowed, and one of its windows has an N
        plain = [re.sub("[^ACGT]", "A", s) for s in family.random([50, 30, 700, 50, 3, 900])]
        bad, long = "ACNGT", plain.pop()
        another = f"{long[:-100]}N{long[-100:]}"
    return [*plain[:2], bad, *plain[2:], bad, another, plain[0]]


def test_fail_names_them_and_keeps_the_rest(tmp_path: Path, family: Family, sequences: list[str]) -> None:
    weights = broken_model(family, tmp_path, math.nan)
    run = Run(tmp_path, 1).build(write(tmp_path / "f.fa", sequences), weights, family.policy)
    with pytest.raises(SeqmillError, match=r"2 sequences have no finite embedding.*'record3' \(record 3\)"):
        run.embed()
    status = json.loads(run.statuses[0].read_text())
    assert status["status"] == "failed"
    assert status["quarantined"]["num_sequences"] == 2
    assert not run.shards[0].exists()
    assert list((tmp_path / "parts").glob("*.part.h5"))
    run.embed(on_error="skip")
    assert json.loads(run.statuses[0].read_text())["resumed_packs"] > 0


@pytest.mark.parametrize("world_size", [1, 3])
def test_skip_leaves_them_out_and_says_so_everywhere(
    tmp_path: Path, family: Family, sequences: list[str], world_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    weights = broken_model(family, tmp_path, math.nan)
    run = Run(tmp_path, world_size).build(write(tmp_path / "f.fa", sequences), weights, family.policy)
    run.embed(on_error="skip").merge()
    assert "3 RECORDS ARE QUARANTINED" in caplog.text
    found = open_embeddings(run.embeddings)
    assert found.ids == [f"record{number}" for number in (1, 2, 4, 5, 6, 9)]
    assert np.isfinite(found[:]).all()
    assert (found["record1"] == found["record9"]).all()
    windowed = int(not family.is_protein)
    fates = {"embedded": 5 - windowed, "windowed": windowed, "duplicate": 1, "quarantined": 3}
    fates |= {"truncated": 0, "rejected": 0, "reused": 0}
    assert json.loads(found.attrs["fate_counts"]) == run.manifest["counts"]["fates"] == fates
    assert sum(fates.values()) == len(sequences) == found.attrs["num_records"]
    table = gzip.decompress((tmp_path / "records.tsv.gz").read_bytes()).decode()
    rows = list(csv.DictReader(table.splitlines(), delimiter="\t"))
    assert [(row["fate"], row["row"]) for row in rows] == [
        ("embedded", "0"),
        ("embedded", "1"),
        ("quarantined", ""),
        ("windowed" if windowed else "embedded", "2"),
        ("embedded", "3"),
        ("embedded", "4"),
        ("quarantined", ""),
        ("quarantined", ""),
        ("duplicate", "5"),
    ]
    assert all("not finite" in row["reason"] for row in rows if row["fate"] == "quarantined")


def test_good_sequences_have_the_same_values_with_and_without_bad_ones(
    tmp_path: Path, family: Family, sequences: list[str]
) -> None:
    good = [sequence for sequence in sequences if not is_bad(family, sequence)]
    weights = broken_model(family, tmp_path, math.nan)
    values = []
    for name, these in (("all", sequences), ("good", good)):
        (tmp_path / name).mkdir()
        run = Run(tmp_path / name, 1).build(write(tmp_path / name / "f.fa", these), weights, family.policy)
        values.append(open_embeddings(run.embed(on_error="skip").merge().embeddings)[:])
    np.testing.assert_allclose(values[0], values[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", [PROTEINS, WINDOWS, ESMC], ids=str)  # T5 has no float16
def test_sequences_that_overflow_half_precision_are_computed_in_float32(
    tmp_path: Path, family: Family, sequences: list[str]
) -> None:
    weights = overflowing_model(family, tmp_path)
    run = Run(tmp_path, 1).build(write(tmp_path / "f.fa", sequences), weights, family.policy).embed("float16")
    half = open_embeddings(run.merge().embeddings)
    assert json.loads(run.statuses[0].read_text())["run"]["recomputed_float32"] == 2
    for path in (*run.shards, *run.statuses):
        path.unlink()
    exact = open_embeddings(run.embed().merge().embeddings)
    for number, sequence in enumerate(sequences):
        error = np.abs(half[number] - exact[number]).max() / np.abs(exact[number]).max()
        assert error < (1e-5 if is_bad(family, sequence) else 5e-3)
        assert (error > 1e-5) != is_bad(family, sequence)


class NoMemory:
    """A model that always runs out of memory."""

    def hidden_states(self, *_: object) -> NoReturn:
        raise MemoryError


def test_too_little_memory_for_float32_names_the_sequence(tmp_path: Path, family: Family, sequences: list[str]) -> None:
    run = Run(tmp_path, 1).build(write(tmp_path / "f.fa", sequences), family.model, family.policy)
    index = open_index(run.index)
    readout = Readout(index.family, Outputs((1,)))
    for row in (0, index.num_sequences - 1):
        pack = int(np.searchsorted(index.pack_offsets, row, side="right")) - 1
        first, last = index.pack_offsets[pack : pack + 2]
        embeddings = np.zeros((last - first, 4), np.float32)
        embeddings[row - first] = math.nan
        finite = FiniteResults(index, torch.device("cpu"), readout, lambda device: NoMemory())
        with pytest.raises(DoesNotFit) as error:
            list(finite([(pack, embeddings, NO_RESIDUES.numpy())]))
        assert index.row_of_segment(error.value.segment) == row


def test_weights_that_are_all_wrong_end_early(tmp_path: Path, family: Family) -> None:
    """The worker stops before it computes the whole FASTA twice."""
    weights = broken_model(family, tmp_path, math.inf)
    first = "C" if family.is_protein else "N"
    fasta = write(tmp_path / "f.fa", [first + s for s in family.random([40] * 1500)])
    run = Run(tmp_path, 1).build(fasta, weights, family.policy)
    with pytest.raises(SeqmillError, match=r"have no finite embedding.*after [0-9] of \d\d packs: check the weights"):
        run.embed()


@pytest.mark.parametrize("family", ONE_EACH, ids=str)
def test_a_result_without_any_embedding_is_a_failure(family: Family, tmp_path: Path) -> None:
    fasta = tmp_path / "all bad.fa"
    fasta.write_text(">a\nMKCV\n>b\nCCC\n" if family.is_protein else ">a\nACNT\n>b\nNNACGTN\n")
    run = Run(tmp_path / "run", 1).build(fasta, broken_model(family, tmp_path, math.nan), family.policy)
    run.embed(on_error="skip")
    with pytest.raises(SeqmillError, match=r"none of its 2 records has a finite embedding, .*; check the weights"):
        run.merge()
    assert not run.embeddings.exists()
    assert not (run.folder / "manifest.json").exists()
