"""Per-residue vectors: equal to fair-esm's, same bits in any shards, whole after a crash, refused when damaged."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from embeddings_file import write_embeddings
from families import CONTIGS, ESMC, PROSTT5, PROTEINS, PROTT5, SMALL_ESM2, Proteins, broken_model
from outputs_by_hand import LENGTHS, POLICIES, blended_by_hand, hidden_by_hand
from pipeline import Run, results_of, run_script, save_parts
from reference import fair_esm_model, save_checkpoint
from seqmill import open_embeddings
from seqmill.base.files import sha256_of_file
from seqmill.embedding import embedder, runner
from seqmill.embedding.audit import StoredVectors, audit_embeddings, judge
from seqmill.errors import SeqmillError
from seqmill.export.export import export_embeddings
from seqmill.spec.families import ESM2
from seqmill.spec.fingerprint import Fingerprint
from seqmill.spec.models import find_model
from seqmill.spec.outputs import Outputs
from seqmill.store.index import open_index, residue_offsets
from seqmill.store.shards import open_shard
from sequences import random_sequences, relative_error

BOTH = {"float16": 6e-4, "float32": 5e-5}  # half a unit in the last place of float16 is 4.9e-4
TWO_LAYERS = (-1, 2)


@dataclass(frozen=True)
class Case:
    """Sequences, their FASTA, seeded weights, and fair-esm's hidden states in float64."""

    sequences: list[str]
    fasta: Path
    checkpoint: str
    hidden: list[dict[int, np.ndarray]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("residues")
    model = fair_esm_model(SMALL_ESM2)
    checkpoint = save_checkpoint(model, folder / "model.pt")
    hidden = [hidden_by_hand([sequence[:1022]], model.double(), (6, 2)) for sequence in PROTEINS.sequences]
    return Case(PROTEINS.sequences, PROTEINS.write_odd(folder), str(checkpoint), hidden)


def embed(case: Case, folder: Path, outputs: Outputs, world_size: int = 1, **settings: object) -> Run:
    folder.mkdir(exist_ok=True)
    return Run(folder, world_size).build(case.fasta, case.checkpoint).embed(outputs=outputs, **settings)


@pytest.mark.parametrize("dtype", BOTH)
def test_every_layer_agrees_with_fair_esm(
    case: Case, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "CPU_PIECE_TOKENS", 700)
    monkeypatch.setattr(embedder, "CPU_KEPT_TOKENS", 400)
    run = embed(case, tmp_path, Outputs(TWO_LAYERS, ("mean",), dtype), world_size=2).merge()
    for layer in (6, 2):
        embeddings = open_embeddings(run.embeddings, layer)
        for record, hidden in enumerate(case.hidden):
            found, states = embeddings.residues(record), hidden[layer][0, 1:-1]
            assert (found.dtype, found.shape) == (np.dtype(dtype), states.shape)
            assert relative_error(found, states) < BOTH[dtype], (layer, record)
            assert relative_error(found.astype(float).mean(axis=0), embeddings[record]) < BOTH[dtype]
    # Sequences 2, 6 and 9 are equal and share their vectors.
    with h5py.File(run.embeddings) as file:
        assert len(set(file["residue_begins"][[1, 5, 8]])) == 1
        assert len(file["residues"]) == sum(min(len(s), 1022) for s in set(case.sequences))


def test_embeddings_keep_their_bits_and_shards_do_not_matter(case: Case, tmp_path: Path) -> None:
    plain = open_embeddings(embed(case, tmp_path / "plain", Outputs(TWO_LAYERS, ("mean", "std"))).merge().embeddings)
    files = []
    for world_size in (1, 3):
        run = embed(case, tmp_path / str(world_size), Outputs(TWO_LAYERS, ("mean", "std"), "float16"), world_size)
        files.append(open_embeddings(run.merge().embeddings))
    assert (plain[:] == files[0][:]).all()
    assert (files[0][:] == files[1][:]).all()
    for record in range(len(plain)):
        assert files[0].residues(record).tobytes() == files[1].residues(record).tobytes()


def test_windows_are_blended(tmp_path: Path) -> None:
    model = fair_esm_model(SMALL_ESM2)
    checkpoint = save_checkpoint(model, tmp_path / "model.pt")
    sequences = random_sequences(LENGTHS)
    fasta = tmp_path / "p.faa"
    fasta.write_text("".join(f">p{n}\n{s}\n" for n, s in enumerate(sequences)))
    run = Run(tmp_path, 2).build(fasta, str(checkpoint), POLICIES["half"])
    embeddings = open_embeddings(run.embed(outputs=Outputs(per_residue="float32")).merge().embeddings)
    for record, sequence in enumerate(sequences):
        expected = blended_by_hand(sequence, POLICIES["half"], model.double(), (6,))[6][1:-1]
        assert relative_error(embeddings.residues(record), expected) < 5e-5, record


@pytest.mark.parametrize("family", [ESMC, PROTT5, PROSTT5], ids=str)
def test_residues_and_poolings_of_other_families(family: Proteins, tmp_path: Path) -> None:
    """Their tokens frame a sequence in other ways, and ProtT5's windows are blended."""
    run = Run(tmp_path, 2).build(family.write_odd(tmp_path), family.model, family.policy)
    outputs = Outputs((-1, 1), ("mean", "max", "std"), "float32")
    run.embed(outputs=outputs, audit_seconds=3600).merge()
    for layer in outputs.layers:
        mean, largest, deviation = (open_embeddings(run.embeddings, layer, pooling) for pooling in outputs.poolings)
        for row, sequence in enumerate(family.sequences):
            states = family.blended(sequence, layer)[family.before : -1]
            assert relative_error(mean.residues(row), states) < 5e-5, (layer, row)
            for vectors, expected in ((mean, states.mean(axis=0)), (largest, states.max(axis=0))):
                assert relative_error(vectors[row], expected) < 5e-5, (layer, row)
            spread = states.std(axis=0)
            assert relative_error(deviation[row], spread) < 5e-5 if len(states) > 1 else not deviation[row].any()
    audits = [json.loads(path.read_text())["audit"] for path in run.statuses]
    assert [audit["verdict"] for audit in audits] == ["ok", "ok"]


def test_residues_are_found_by_id_or_row(case: Case, tmp_path: Path) -> None:
    embeddings = open_embeddings(embed(case, tmp_path, Outputs(per_residue="float16")).merge().embeddings)
    by_row = embeddings.residues(0)
    assert by_row.shape == (5, SMALL_ESM2.hidden_dim)
    assert (embeddings.residues("sp|P12345|TEST_HUMAN") == by_row).all()
    assert (embeddings.residues(-1) == embeddings.residues(len(embeddings) - 1)).all()
    with pytest.raises(SeqmillError, match=r"the id 'twice': use a row instead, one of \[3, 4, 11\]"):
        embeddings.residues("twice")
    with pytest.raises(KeyError, match="no record has the id 'absent'"):
        embeddings.residues("absent")
    with pytest.raises(IndexError):
        embeddings.residues(len(embeddings))


def test_a_file_without_residues_says_so(case: Case, tmp_path: Path) -> None:
    embeddings = open_embeddings(embed(case, tmp_path, Outputs()).merge().embeddings)
    with pytest.raises(SeqmillError, match="has no vectors of residues; embed with --config per_residue=float16"):
        embeddings.residues(0)


def test_finished_packs_are_resumed(case: Case, tmp_path: Path) -> None:
    outputs = Outputs(per_residue="float16")
    run = embed(case, tmp_path, outputs)
    before, index = open_shard(run.shards[0]), open_index(run.index)
    residues, offsets = before.residues.tobytes(), before.residue_offsets.tolist()
    fingerprint = Fingerprint.from_attributes(json.loads(run.statuses[0].read_text())["fingerprint"])
    shutil.rmtree(tmp_path / "parts")  # parts stay until the merge
    save_parts(tmp_path / "parts", index, fingerprint, results_of(run)[1:3], "shard_1-of-2.h5")
    run.shards[0].unlink()
    run.embed(outputs=outputs)
    assert json.loads(run.statuses[0].read_text())["resumed_packs"] == 2
    after = open_shard(run.shards[0])
    assert (after.residues.tobytes(), after.residue_offsets.tolist()) == (residues, offsets)


def test_parts_without_residues_are_not_used(case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = embed(case, tmp_path, Outputs())
    fingerprint = Fingerprint.from_attributes(json.loads(run.statuses[0].read_text())["fingerprint"])
    save_parts(tmp_path / "parts", open_index(run.index), fingerprint, results_of(run), "shard_0-of-1.h5")
    run.embed(outputs=Outputs(per_residue="float32"))
    assert json.loads(run.statuses[0].read_text())["resumed_packs"] == 0
    assert "per_residue is , not float32" in caplog.text


@pytest.mark.parametrize("poolings", [("mean",), ("cls",)])
def test_a_quarantined_sequence_has_no_residues(poolings: tuple[str, ...], tmp_path: Path) -> None:
    """Even if its first token does not see the residue: layer 0 is only the residue's own embedding."""
    sequences = [s.replace("C", "A") for s in random_sequences([30, 50, 20, 600, 41])]
    sequences[1] = sequences[1][:7] + "C" + sequences[1][8:]
    fasta = tmp_path / "p.faa"
    fasta.write_text("".join(f">p{n}\n{s}\n" for n, s in enumerate(sequences)))
    run = Run(tmp_path, 1).build(fasta, broken_model(PROTEINS, tmp_path, math.nan))
    run.embed(outputs=Outputs((0,), poolings, "float16"), on_error="skip").merge()
    embeddings = open_embeddings(run.embeddings)
    assert embeddings.ids == ["p0", "p2", "p3", "p4"]
    assert [len(embeddings.residues(id_)) for id_ in embeddings.ids] == [30, 20, 600, 41]
    assert all(np.isfinite(embeddings.residues(id_)).all() for id_ in embeddings.ids)


def test_values_beyond_float16_are_an_error_that_names_the_sequence(tmp_path: Path) -> None:
    fasta = tmp_path / "p.faa"
    fasta.write_text(f">p0\n{'A' * 40}\n>p1\n{'A' * 20}C\n")
    run = Run(tmp_path, 1).build(fasta, broken_model(PROTEINS, tmp_path, 1e6))
    run.embed(outputs=Outputs((0,), per_residue="float32"))
    with pytest.raises(SeqmillError, match=r"'p1' \(record 2\): a residue has values beyond float16 .* float32"):
        run.embed(outputs=Outputs((0,), per_residue="float16"))
    assert json.loads(run.statuses[0].read_text())["status"] == "failed"


def test_nucleotides_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, 1).build(CONTIGS.write_odd(tmp_path), CONTIGS.model, CONTIGS.policy)
    with pytest.raises(SeqmillError, match="per_residue is for proteins"):
        run.embed(outputs=Outputs(per_residue="float16"))


def _plant_nan(file: h5py.File) -> None:
    file["residues"][60, 3] = np.nan


def _shift(file: h5py.File) -> None:
    file["residue_offsets"][1] -= 1


def _cut(file: h5py.File) -> None:
    values = file["residues"][:-1]
    del file["residues"]
    file["residues"] = values


def _drop(file: h5py.File) -> None:
    del file["residue_offsets"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_plant_nan, "the residues of 'Ünïcødé-蛋白' are not finite"),
        (_shift, "its residues are not those of its sequences"),
        (_cut, r"residues are float16 \(\d+, 64\), not float16 \(\d+, ...\)"),
        (_drop, "lacks residue_offsets"),
    ],
)
def test_the_merge_refuses_damaged_residues(case: Case, damage: Callable, message: str, tmp_path: Path) -> None:
    run = embed(case, tmp_path, Outputs(per_residue="float16"))
    with h5py.File(run.shards[0], "r+") as file:
        damage(file)
    status, shard = json.loads(run.statuses[0].read_text()), run.shards[0]
    status |= {"shard_sha256": sha256_of_file(shard), "shard_bytes": shard.stat().st_size}
    run.statuses[0].write_text(json.dumps(status))
    with pytest.raises(SeqmillError, match=message):
        run.merge()
    assert not run.embeddings.exists()


def test_the_audit_compares_residues(case: Case, tmp_path: Path) -> None:
    outputs = Outputs(TWO_LAYERS, ("mean",), "float16")
    run = embed(case, tmp_path, outputs, audit_seconds=3600)
    status = json.loads(run.statuses[0].read_text())
    assert status["audit"]["verdict"] == "ok"
    assert status["audit"]["sequences"] >= 1  # more if time allows, which is little for so few tokens
    assert status["audit"]["worst_relative_error"] < 1e-4
    shard, index = open_shard(run.shards[0]), open_index(run.index)
    offsets = residue_offsets(index, shard.index_rows)

    def residues(row: int) -> np.ndarray:
        return shard.residues[offsets[row] : offsets[row + 1]]

    source, rows = find_model(case.checkpoint), shard.index_rows
    stored = StoredVectors(index, outputs.of(6), shard.embeddings.__getitem__, residues)
    found = audit_embeddings(stored, source, rows, 3600)
    assert judge(found, "bfloat16", ESM2)[0] == "ok"
    assert found.sequences >= 2
    found = audit_embeddings(replace(stored, residues_of=lambda row: residues(row)[::-1]), source, rows, 3600)
    assert judge(found, "bfloat16", ESM2)[0] == "fail"


def test_the_program_saves_residues(tmp_path: Path) -> None:
    run = Run(tmp_path, 1)
    fasta = tmp_path / "p.faa"
    fasta.write_text(">one\nMKTAYIAKQR\n")
    run.build(fasta)
    where = ("--output", run.shards[0], "--status", run.statuses[0])
    shared = ("--index", run.index, "--rank", 0, "--world-size", 1, "--device", "cpu", *where)
    done = run_script("embed_shard.py", *shared, "--per-residue", "float16")
    assert done.returncode == 0, done.stderr
    assert open_embeddings(run.merge().embeddings).residues("one").shape == (10, 320)


def test_exports(case: Case, tmp_path: Path) -> None:
    """In ProtTrans's format, and as fair-esm's extract.py saves them with `--include per_tok`."""
    run = embed(case, tmp_path, Outputs(per_residue="float16")).merge()
    embeddings = open_embeddings(run.embeddings)
    export_embeddings(run.embeddings, tmp_path / "residues.h5", "h5_residues")
    with h5py.File(tmp_path / "residues.h5") as file:
        assert len(file) == len(embeddings)
        names = csv.DictReader((tmp_path / "residues.h5.names.tsv").open(newline=""), delimiter="\t")
        for row, name in enumerate(line["name"] for line in names):
            assert file[name].dtype == np.float16
            assert np.array_equal(file[name][:], embeddings.residues(row))
    export_embeddings(run.embeddings, tmp_path / "pt", "pt")
    content = torch.load(tmp_path / "pt/sp|P12345|TEST_HUMAN.pt")
    assert set(content) == {"label", "representations", "mean_representations"}
    assert np.array_equal(content["representations"][6].numpy(), embeddings.residues(0).astype(np.float32))


def test_an_export_without_residues_is_refused(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.h5", np.ones((2, 3)))
    with pytest.raises(SeqmillError, match="has no vectors of residues"):
        export_embeddings(path, tmp_path / "residues.h5", "h5_residues")
    assert [path.name for path in tmp_path.iterdir()] == ["e.h5"]
