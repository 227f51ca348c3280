"""When a FASTA has grown, the workflow computes only the new sequences, and a rerun does nothing."""

import json
import shutil
from pathlib import Path

import pytest
from test_workflow import SLUG, rules_run, snakemake

from families import write_fasta
from pipeline import MODEL
from seqmill import open_embeddings
from sequences import random_sequences

SEQUENCES = random_sequences([300, 200, 120, 90, 60, 60, 30, 10])
SETTINGS = {"model": MODEL, "precision": "float32", "audit_seconds": 0}


def grow(folder: Path, results: Path) -> dict[str, object]:
    """Embed all sequences as dataset `new`, reusing the earlier results; return the settings without `reuse`."""
    shutil.copytree(results, folder)
    write_fasta(folder / "new.faa", SEQUENCES[::-1])
    settings = {**SETTINGS, "fasta": "new.faa"}
    done = snakemake(folder, config={**settings, "reuse": f"results/old/{SLUG}/embeddings.h5"})
    assert done.returncode == 0, done.stdout
    return settings


def fates(embeddings: Path) -> dict[str, int]:
    return json.loads(open_embeddings(embeddings).attrs["fate_counts"])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with results for the first six sequences."""
    folder = tmp_path_factory.mktemp("grown")
    write_fasta(folder / "old.faa", SEQUENCES[:6])
    done = snakemake(folder, config={**SETTINGS, "fasta": "old.faa"})
    assert done.returncode == 0, done.stdout
    return folder


def test_only_the_new_sequences_of_a_grown_fasta_are_computed(results: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(results, folder)
    write_fasta(folder / "new.faa", SEQUENCES[::-1])
    (folder / "contigs.fna").write_text(">c\nACGTACGTAC\n")
    (folder / "table.tsv").write_text(f"dataset\tfasta\tmodel\nnew\tnew.faa\t{MODEL}\n")
    old, settings = Path("results/old", SLUG, "embeddings.h5"), {**SETTINGS, "datasets": "table.tsv", "shards": 2}
    done = snakemake(folder, config={**settings, "reuse": old})
    assert done.returncode == 0, done.stdout
    new = folder / "results/new" / SLUG
    statuses = [json.loads((new / f"shards/shard_{rank}-of-2.status.json").read_text()) for rank in range(2)]
    assert sum(status["run"]["num_tokens"] for status in statuses) == 30 + 10 + 4
    found = open_embeddings(new / "embeddings.h5")
    assert (found[2:] == open_embeddings(folder / old)[::-1]).all()
    assert json.loads(found.attrs["fate_counts"])["reused"] == 6

    # Nothing is computed again if `reuse` is removed or the earlier results are gone.
    for reuse in ({"reuse": old}, {}):
        assert "Nothing to be done" in snakemake(folder, config={**settings, **reuse}).stdout
    shutil.rmtree(folder / "results/old")
    assert "Nothing to be done" in snakemake(folder, config=settings).stdout
    index = (new / "index.h5").read_bytes()
    (new / "index.h5").unlink()
    assert "Nothing to be done" in snakemake(folder, config=settings).stdout
    (new / "index.h5").write_bytes(index)
    assert "old" in snakemake(folder, "--dry-run", config={**settings, "reuse": old}).stdout
    # Another pooling computes every sequence again.
    done = snakemake(folder, config={**settings, "pooling": "max"})
    assert done.returncode == 0, done.stdout
    assert "build_index" in rules_run(done.stdout)
    assert json.loads(open_embeddings(new / "embeddings.h5").attrs["fate_counts"])["reused"] == 0


def test_other_settings_are_refused_when_the_earlier_results_are_gone(results: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    settings = grow(folder, results)
    new, old, away = folder / f"results/new/{SLUG}", folder / "results/old", tmp_path / "away"
    index = (new / "index.h5").read_bytes()
    old.rename(away)
    for changed in ({"dtype": "float16"}, {"shards": 2}):
        done = snakemake(folder, config={**settings, **changed})
        assert done.returncode != 0
        assert (
            f"{old}/{SLUG}/embeddings.h5: no such embeddings file; results/new/{SLUG} takes vectors from it"
            in done.stdout
        )
        assert "Traceback" not in done.stdout
        assert rules_run(done.stdout) == []
        assert open_embeddings(new / "embeddings.h5").array.dtype == "float32"
        (new / "index.h5").unlink(missing_ok=True)  # the manifest alone must give the same error
    # With the earlier results back, the runs succeed; an existing index is not built again.
    away.rename(old)
    done = snakemake(folder, config={**settings, "dtype": "float16"})
    assert done.returncode == 0, done.stdout
    assert "build_index" in rules_run(done.stdout)
    assert (new / "index.h5").read_bytes() == index
    assert (fates(new / "embeddings.h5")["reused"], open_embeddings(new / "embeddings.h5").array.dtype) == (
        6,
        "float16",
    )
    done = snakemake(folder, config={**settings, "shards": 2})
    assert rules_run(done.stdout) == ["all", "embed_shard", "embed_shard", "merge_shards", "report"]
    assert (fates(new / "embeddings.h5")["reused"], open_embeddings(new / "embeddings.h5").array.dtype) == (
        6,
        "float32",
    )
    # A replaced earlier result is noticed before the merge removes anything.
    with (old / SLUG / "embeddings.h5").open("ab") as file:
        file.write(bytes(8))
    done = snakemake(folder, config={**settings, "shards": 2, "dtype": "float16"})
    assert "when the index was built; results/new" in done.stdout
    assert rules_run(done.stdout) == []
    assert (new / "embeddings.h5").exists()
    # The errors' advice works.
    (new / "index.h5").unlink()
    (new / "manifest.json").unlink()
    done = snakemake(folder, config=settings)
    assert done.returncode == 0, done.stdout
    assert fates(new / "embeddings.h5")["reused"] == 0


def test_a_run_does_not_replace_what_it_reuses(results: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    alone = grow(folder, results)
    (folder / "table.tsv").write_text(f"dataset\tfasta\tmodel\nold\told.faa\t{MODEL}\nnew\tnew.faa\t{MODEL}\n")
    both = {**SETTINGS, "datasets": "table.tsv"}
    old, new = (folder / f"results/{name}/{SLUG}/embeddings.h5" for name in ("old", "new"))
    assert "Nothing to be done" in snakemake(folder, config=both).stdout
    before = [old.read_bytes(), new.read_bytes()]
    done = snakemake(folder, config={**both, "dtype": "float16"})
    assert done.returncode != 0
    assert (
        f"{old}: this run would replace it, and results/new/{SLUG} takes vectors from it: run dataset new"
        in done.stdout
    )
    assert "Traceback" not in done.stdout
    assert rules_run(done.stdout) == []
    assert [old.read_bytes(), new.read_bytes()] == before
    # One after the other, as the message says.
    done = snakemake(folder, config={**alone, "dtype": "float16"})
    assert rules_run(done.stdout) == ["all", "merge_shards", "report"]
    done = snakemake(folder, config={**both, "dtype": "float16"})
    assert rules_run(done.stdout) == ["all", "merge_shards", "report"]
    for path in (old, new):
        assert open_embeddings(path).array.dtype == "float16"
    done = snakemake(folder, config=alone)  # refused before a merge removes the results
    assert "its vectors are rounded to float16, and dtype is float32" in done.stdout
    assert rules_run(done.stdout) == []
    assert fates(new)["reused"] == 6
    assert "Nothing to be done" in snakemake(folder, config={**both, "dtype": "float16"}).stdout


def test_residue_vectors_are_dropped_without_recomputing(results: Path, tmp_path: Path) -> None:
    write_fasta(tmp_path / "old.faa", SEQUENCES[:2])
    settings = {**SETTINGS, "fasta": "old.faa"}
    assert snakemake(tmp_path, config={**settings, "per_residue": "true"}).returncode == 0
    (tmp_path / "results/old").rename(tmp_path / "with_residues")
    done = snakemake(tmp_path, config={**settings, "reuse": f"with_residues/{SLUG}/embeddings.h5"})
    assert done.returncode == 0, done.stdout
    found = [open_embeddings(tmp_path / folder / SLUG / "embeddings.h5") for folder in ("with_residues", "results/old")]
    assert (found[0][:] == found[1][:]).all()
    assert json.loads(found[1].attrs["fate_counts"])["reused"] == 2


def test_each_dataset_reuses_results_of_its_own_family(results: Path, tmp_path: Path) -> None:
    write_fasta(tmp_path / "new.faa", SEQUENCES[:7])
    (tmp_path / "contigs.fna").write_text(">c\nACGTACGTAC\n")
    rows = f"new\tnew.faa\t{MODEL}\ncontigs\tcontigs.fna\tuntrained:dnabert_s\n"
    (tmp_path / "table.tsv").write_text(f"dataset\tfasta\tmodel\n{rows}")
    old = results / "results/old" / SLUG / "embeddings.h5"
    settings = {**SETTINGS, "datasets": "table.tsv", "reuse": f"[{old}]"}
    done = snakemake(tmp_path, "--dry-run", "--printshellcmds", config=settings)
    assert done.returncode == 0, done.stdout
    (proteins,) = [line for line in done.stdout.splitlines() if "build_index.py --fasta=new.faa" in line]
    (contigs,) = [line for line in done.stdout.splitlines() if "build_index.py --fasta=contigs.fna" in line]
    assert f"--reuse {old} " in proteins
    assert str(old) not in contigs


WRONG = {
    "none": ({"reuse": "none.h5"}, "none.h5: no such file; take it out of reuse"),
    "no result": ({"reuse": "new.faa"}, "new.faa: not a readable HDF5 embeddings file"),
    "its own result": ({"reuse": "OLD", "fasta": "old.faa"}, "this run would replace it; move its folder, or copy it"),
    "another pooling": ({"reuse": "OLD", "pooling": "max"}, "it has pooling=mean, this computation pooling=max"),
    "another layer": ({"reuse": "OLD", "layers": 3}, "it has layers=6, this computation layers=3"),
    "another length": ({"reuse": "OLD", "max_length": 50}, "or set max_length: 1022"),
    "another precision": ({"reuse": "OLD", "precision": "bfloat16"}, "or set precision: float32"),
    "another model": (
        {"reuse": "OLD", "model": "untrained:esm2_t12_35M_UR50D"},
        "its model is untrained:esm2_t6_8M_UR50D, not untrained:esm2_t12_35M_UR50D",
    ),
    "another family": (
        {"reuse": "OLD", "fasta": "contigs.fna", "model": "untrained:dnabert_s"},
        "no dataset has a model of that family",
    ),
    "a number": ({"reuse": 5}, "config reuse: 5 is not allowed; give text that is not empty"),
}


@pytest.mark.parametrize("name", WRONG)
def test_unusable_results_are_refused_before_any_rule_runs(name: str, results: Path) -> None:
    config, message = WRONG[name]
    write_fasta(results / "new.faa", SEQUENCES)
    (results / "contigs.fna").write_text(">c\nACGTACGTAC\n")
    old = f"results/old/{SLUG}/embeddings.h5"
    config = {key: old if value == "OLD" else value for key, value in config.items()}
    done = snakemake(results, "--dry-run", config={**SETTINGS, "fasta": "new.faa", **config})
    assert done.returncode != 0
    assert message in done.stdout
    assert "Traceback" not in done.stdout
    assert rules_run(done.stdout) == []
