"""ESM C and T5 through the whole workflow: in one table, with a checkpoint and a folder of one's own."""

import gzip
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from test_workflow import rules_run, snakemake

import esmc_reference
import t5_reference
from families import write_fasta
from pipeline import CONTIGS_DEMO
from seqmill import open_embeddings
from sequences import random_sequences, relative_error

SEQUENCES = [*random_sequences([300, 120, 61, 61, 7, 1]), "MKVUZOBJ*", "mkvlaa*"]
CLEAN = [*SEQUENCES[:6], "MKVUZOBX", "MKVLAA"]
UZOB = sum(letter in "UZOB" for sequence in SEQUENCES for letter in sequence)
SETTINGS = {"datasets": "table.tsv", "precision": "float32", "shards": 1, "audit_seconds": 5}
ESMC, PROSTT5 = "results/c/mine", "results/t/prost"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a checkpoint of ESM C, a folder of ProstT5, and a table that embeds proteins with both."""
    folder = tmp_path_factory.mktemp("work")
    torch.save(esmc_reference.older_layout(esmc_reference.seeded_state()), folder / "mine.pth")
    t5_reference.save_folder(folder / "prost", t5_reference.SMALL_PROSTT5)
    write_fasta(folder / "p.faa", SEQUENCES)
    (folder / "table.tsv").write_text("dataset\tfasta\tmodel\nc\tp.faa\tmine.pth\nt\tp.faa\tprost\n")
    return folder


@pytest.fixture(scope="module")
def done(folder: Path) -> subprocess.CompletedProcess[str]:
    return snakemake(folder, config=SETTINGS)


def expected(name: str, sequence: str) -> np.ndarray:
    """Return the mean over the residues of the last hidden states, as transformers computes them."""
    if name == ESMC:
        tokens = esmc_reference.tokens_of(sequence)
        hidden = esmc_reference.reference_hidden(esmc_reference.seeded_model(), tokens)[-1]
    else:
        tokens = t5_reference.tokens_of(sequence, t5_reference.SMALL_PROSTT5)
        hidden = t5_reference.reference_hidden(t5_reference.seeded_model(t5_reference.SMALL_PROSTT5), tokens)[-1]
    return hidden[1:-1].mean(dim=0).numpy()


@pytest.mark.parametrize(
    ("name", "family", "max_length", "letters"),
    [(ESMC, "esmc", 2046, {"j_to_x": 1}), (PROSTT5, "prostt5", 12_000, {"j_to_x": 1, "uzob_to_x": UZOB})],
    ids=["ESM C", "ProstT5"],
)
def test_both_families_in_one_run(
    folder: Path,
    done: subprocess.CompletedProcess[str],
    name: str,
    family: str,
    max_length: int,
    letters: dict[str, int],
) -> None:
    assert done.returncode == 0, done.stdout
    steps = ["build_index", "embed_shard", "merge_shards", "report"]
    assert rules_run(done.stdout) == sorted(["all", *steps, *steps])
    found = open_embeddings(folder / name / "embeddings.h5")
    assert found.ids == [f"id{number}" for number in range(len(SEQUENCES))]
    for vector, sequence in zip(found, CLEAN, strict=True):
        assert relative_error(vector, expected(name, sequence)) < 5e-5
    assert (found.attrs["tokenizer"], found.attrs["max_length"]) == (family, max_length)
    unchanged = {"lower_case": 6, "trailing_stop": 2, "inner_stop_to_x": 0}
    assert json.loads(found.attrs["letter_counts"]) == {**unchanged, **letters}
    with gzip.open(folder / name / "records.tsv.gz", "rt") as table:
        assert len(table.readlines()) == len(SEQUENCES) + 1
    assert found.attrs["audit_worst_cosine"] > 0.9999
    page = (folder / name / "report.html").read_text()
    assert ("U, Z, O, and B to X" in page) == (family == "prostt5")
    assert "to 300 residues, median" in page


def test_a_second_run_does_nothing(folder: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0
    assert "Nothing to be done" in snakemake(folder, config=SETTINGS).stdout


def test_nucleotides_are_refused_by_both(folder: Path, tmp_path: Path) -> None:
    lines = (f"{name}\t{CONTIGS_DEMO}\t{folder / model}" for name, model in (("c", "mine.pth"), ("t", "prost")))
    (tmp_path / "table.tsv").write_text("\n".join(["dataset\tfasta\tmodel", *lines]) + "\n")
    said = snakemake(tmp_path, "--retries", "0", "--keep-going", config=SETTINGS).stdout
    failed = said.partition("\nFailed:\n")[2]
    told = r"^  {}: .*this looks like nucleotides, and the model is for proteins; translate the sequences"
    for name in ("c/mine", "t/prost"):
        assert len(re.findall(told.format(name), failed, re.MULTILINE)) == 1, said
    assert "Traceback" not in said
    assert not list((tmp_path / "results").rglob("*.h5"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"precision": "float16"},
            "dataset t, model prost: precision float16 is not for ProstT5: T5's feed-forward overflows in float16",
        ),
        ({"pooling": "cls"}, "dataset t, model prost: pooling cls: ProstT5 has no cls token; use mean, max, or std"),
    ],
)
def test_what_t5_does_not_have_is_refused_before_any_rule_runs(
    folder: Path, settings: dict[str, str], message: str
) -> None:
    said = snakemake(folder, config={**SETTINGS, **settings})
    assert said.returncode != 0
    assert said.stdout.count(message) == 1
    assert "Traceback" not in said.stdout
    assert rules_run(said.stdout) == []
