"""The embeddings have the same bits, order and ids for any number of shards."""

from __future__ import annotations

import hashlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline import DEMO, Run
from reference import fair_esm_hidden, fair_esm_model, save_checkpoint
from seqpack import open_embeddings
from seqpack.index import open_index
from seqpack.models.registry import MODELS
from sequences import random_sequences, relative_error

ODD_IDS = [
    "sp|P12345|TEST_HUMAN",
    "a/b/c",
    "../escape",
    "twice",
    "twice",
    "L" * 300,
    "Ünïcødé-蛋白",
    '"quoted"',
    "",
    "NA",
    ".",
    "twice",
]


@pytest.fixture(scope="module")
def odd_fasta(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Twelve records with odd ids, among them duplicates of a sequence, and the sequences."""
    sequences = random_sequences([5, 60, 60, 1, 300, 60, 1030, 2, 60, 700, 31, 1])
    sequences[8] = sequences[1]
    sequences[5] = sequences[1]
    path = tmp_path_factory.mktemp("fasta") / "odd ids.faa"
    records = zip(ODD_IDS, sequences, strict=True)
    text = "".join(f">{id_ and id_ + ' some words'}\n{sequence}\n" for id_, sequence in records)
    path.write_text(text, encoding="utf-8")
    return path, sequences


def dataset_digest(path: Path) -> str:
    with h5py.File(path) as file:
        return hashlib.sha256(file["embeddings"][:].tobytes()).hexdigest()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_any_number_of_shards_gives_the_same_bits(
    odd_fasta: tuple[Path, list[str]], tmp_path: Path, precision: str
) -> None:
    fasta, sequences = odd_fasta
    digests = {}
    for world_size in (1, 2, 3, 8, 20):  # 20: more shards than sequences
        folder = tmp_path / str(world_size)
        run = Run(folder, world_size).build(fasta).embed(precision).merge()
        digests[world_size] = dataset_digest(run.embeddings)
        assert digests[world_size] == run.manifest["outputs"]["embeddings.h5"]["embeddings_sha256"]
        embeddings = open_embeddings(run.embeddings)
        assert embeddings.ids == ODD_IDS
        assert embeddings.lengths.tolist() == [len(sequence) for sequence in sequences]
        assert (embeddings[1] == embeddings[8]).all()
        assert (embeddings[0] != embeddings[1]).any()
    assert len(set(digests.values())) == 1, digests


def test_shards_without_work_are_complete_and_have_the_right_shape(
    odd_fasta: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run = Run(tmp_path, 20).build(odd_fasta[0]).embed()
    with h5py.File(run.shards[-1]) as shard:
        assert shard["embeddings"].shape == (0, 320)
        assert shard["sequence_ids"].shape == (0,)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_demo_has_the_same_bits_with_any_number_of_shards_and_threads(tmp_path: Path, precision: str) -> None:
    runs = []
    for world_size, threads in ((1, 1), (1, 2), (1, 5), (2, 1), (3, 2), (8, 1)):
        run = Run(tmp_path / f"{world_size}-{threads}", world_size)
        runs.append(run.build(DEMO).embed(precision, threads).merge())
    assert open_index(runs[0].index).num_packs > 8
    assert len({dataset_digest(run.embeddings) for run in runs}) == 1


def test_values_are_those_of_fair_esm_record_by_record(odd_fasta: tuple[Path, list[str]], tmp_path: Path) -> None:
    """From the FASTA to the merged file, so that a mix-up of rows anywhere would show."""
    fasta, sequences = odd_fasta
    reference = fair_esm_model(MODELS["esm2_t6_8M_UR50D"])
    checkpoint = save_checkpoint(reference, tmp_path / "model.pt")
    run = Run(tmp_path, 3).build(fasta, str(checkpoint)).embed("float32").merge()
    found = open_embeddings(run.embeddings)
    for row, sequence in enumerate(sequences):
        expected = fair_esm_hidden(reference, sequence[:1022])[1:-1].mean(axis=0)
        assert relative_error(found[row], expected) < 5e-5, row


def test_other_neighbors_change_a_result_by_no_more_than_rounding(tmp_path: Path) -> None:
    sequences = random_sequences([50, 51, 52, 300])
    alone, together = tmp_path / "alone.faa", tmp_path / "together.faa"
    alone.write_text(f">a\n{sequences[1]}\n")
    together.write_text("".join(f">{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
    first = Run(tmp_path / "alone", 1).build(alone).embed().merge()
    second = Run(tmp_path / "together", 1).build(together).embed().merge()
    found = open_embeddings(second.embeddings)[1]
    assert relative_error(found, open_embeddings(first.embeddings)[0]) < 1e-6
    assert not np.array_equal(found, open_embeddings(second.embeddings)[0])
