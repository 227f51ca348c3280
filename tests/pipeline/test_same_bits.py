"""Embeddings have the same bits, order and ids for any number of shards, and agree with the references."""

import hashlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from families import CONTIGS, EACH, ESMC, ODD_IDS, ONE_EACH, PROSTT5, PROTEINS, PROTT5, WINDOWS, Family
from pipeline import CONTIGS_DEMO, DEMO, MODEL, Run
from seqmill import open_embeddings
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.outputs import Outputs
from seqmill.store.index import open_index
from sequences import relative_error


def dataset_digest(path: Path) -> str:
    with h5py.File(path) as file:
        return hashlib.sha256(file["embeddings"][:].tobytes()).hexdigest()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", EACH, ids=str)
def test_any_number_of_shards_gives_the_same_bits(tmp_path: Path, family: Family, precision: str) -> None:
    fasta, sequences = family.write_odd(tmp_path), family.sequences
    digests = {}
    world_sizes = (1, 2, 3, 8, 20) if precision == "float32" else (1, 2, 3, 8)  # 20: more shards than sequences
    for world_size in world_sizes:
        folder = tmp_path / str(world_size)
        run = Run(folder, world_size).build(fasta, family.model, family.policy).embed(precision).merge()
        digests[world_size] = dataset_digest(run.embeddings)
        assert digests[world_size] == run.manifest["outputs"]["embeddings.h5"]["embeddings_sha256"]
        embeddings = open_embeddings(run.embeddings)
        assert embeddings.ids == ODD_IDS
        assert embeddings.lengths.tolist() == [len(sequence) for sequence in sequences]
        assert embeddings[:].shape == (len(ODD_IDS), family.hidden_dim)
        assert (embeddings[1] == embeddings[8]).all()
        assert (embeddings[0] != embeddings[1]).any()
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("family", ONE_EACH, ids=str)
def test_shards_without_work_are_complete_and_have_the_right_shape(tmp_path: Path, family: Family) -> None:
    run = Run(tmp_path, 20).build(family.write_odd(tmp_path), family.model, family.policy).embed()
    with h5py.File(run.shards[-1]) as shard:
        assert shard["embeddings"].shape == (0, family.hidden_dim)
        assert shard["sequence_ids"].shape == (0,)


@pytest.mark.full
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "fasta", "policy"),
    [
        (PROTEINS, DEMO, PROTEINS.policy),
        (WINDOWS, CONTIGS_DEMO, LengthPolicy("window", 1000, 1000, 700, "both")),
        (CONTIGS, CONTIGS_DEMO, LengthPolicy("full", 0)),
    ],
    ids=map(str, (PROTEINS, WINDOWS, CONTIGS)),
)
def test_the_demos_have_the_same_bits_with_any_number_of_shards_and_threads(
    tmp_path: Path, family: Family, fasta: Path, policy: LengthPolicy, precision: str
) -> None:
    runs, model = [], MODEL if family is PROTEINS else family.model  # of real size, where rounding could differ
    for world_size, threads in ((1, 1), (1, 2), (1, 5), (2, 1), (3, 2), (8, 1)):
        run = Run(tmp_path / f"{world_size}-{threads}", world_size)
        runs.append(run.build(fasta, model, policy).embed(precision, threads).merge())
    assert open_index(runs[0].index).num_packs > 8
    assert len({dataset_digest(run.embeddings) for run in runs}) == 1


@pytest.mark.parametrize(
    ("family", "pooling"),
    [
        *((family, pooling) for family in (PROTEINS, ESMC) for pooling in ("mean", "cls")),
        *((family, "mean") for family in (PROTT5, PROSTT5)),
        *((family, pooling) for family in (CONTIGS, WINDOWS) for pooling in ("mean", "mean_tokens", "cls")),
    ],
    ids=str,
)
def test_values_are_those_of_the_reference_for_every_record(tmp_path: Path, family: Family, pooling: str) -> None:
    """Covers the FASTA to the merged file, so a mix-up of rows, windows or strands anywhere would show."""
    run = Run(tmp_path, 3).build(family.write_odd(tmp_path), family.seeded_model, family.policy)
    found = open_embeddings(run.embed(outputs=Outputs((-1,), (pooling,))).merge().embeddings)
    assert found.attrs["pooling"] == pooling
    for row, sequence in enumerate(family.sequences):
        assert relative_error(found[row], family.expected(sequence, pooling)) < 5e-5, row


@pytest.mark.parametrize("family", ONE_EACH, ids=str)
def test_neighbors_change_a_result_only_by_rounding(tmp_path: Path, family: Family) -> None:
    sequences = family.random([50, 1021, 52, 300])
    alone, together = tmp_path / "alone.fa", tmp_path / "together.fa"
    alone.write_text(f">a\n{sequences[1]}\n")
    together.write_text("".join(f">{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
    first = Run(tmp_path / "alone", 1).build(alone, family.model, family.policy).embed().merge()
    second = Run(tmp_path / "together", 1).build(together, family.model, family.policy).embed().merge()
    found = open_embeddings(second.embeddings)[1]
    assert relative_error(found, open_embeddings(first.embeddings)[0]) < 1e-6
    assert not np.array_equal(found, open_embeddings(second.embeddings)[0])
