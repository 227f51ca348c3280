"""A run through Snakemake matches its request, even without Snakemake's records or by modification times alone."""

import json
import os
import random
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from test_workflow import SLUG, rules_run, snakemake

from edited_run import FASTAS, EditedRun, Settings, checkpoint
from pipeline import MODEL, REPOSITORY
from seqmill import open_embeddings

HOUR = 3600
KNOWN, FORGOTTEN, BY_TIME = "its records", "no records", "times alone"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a finished run of a.fa with model.pt."""
    folder = tmp_path_factory.mktemp("finished")
    EditedRun(folder, random.Random(0))
    done = run(folder)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "work")
    return tmp_path / "work"


def run(folder: Path, how: str = KNOWN, repository: Path = REPOSITORY, **settings: object) -> object:
    """Run the workflow on a.fa; `how` sets what Snakemake knows about earlier runs."""
    if how == FORGOTTEN:
        shutil.rmtree(folder / ".snakemake")
    triggers = ["--rerun-triggers", "mtime"] if how == BY_TIME else []
    config = {"fasta": "a.fa"} if "datasets" not in settings else {}
    config |= {"model": "model.pt", "shards": 1, "precision": "float32", "audit_seconds": 0, **settings}
    return snakemake(folder, "--retries", "0", *triggers, config=config, repository=repository)


def embeddings_of(folder: Path) -> Path:
    return folder / "results/a/model/embeddings.h5"


EACH = pytest.mark.parametrize("how", [KNOWN, FORGOTTEN, BY_TIME])


@EACH
def test_a_replaced_fasta_with_an_older_time_is_refused(how: str, folder: Path) -> None:
    before = embeddings_of(folder).read_bytes()
    EditedRun.write(EditedRun(folder, random.Random(0)), "a.fa", FASTAS[1].encode(), 30)
    done = run(folder, how)
    assert done.returncode != 0
    assert "seqmill: results/a/model holds the results of a.fa (23 bytes" in done.stdout
    assert "another file that is not newer: a.fa (23 bytes" in done.stdout
    assert "Traceback" not in done.stdout
    assert rules_run(done.stdout) == []
    assert embeddings_of(folder).read_bytes() == before


@EACH
def test_another_file_of_the_same_name_is_refused_even_if_the_first_was_moved(how: str, folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "a.fa").rename(folder / "first.fa")
    (folder / "other/a.fa").write_text(FASTAS[1])
    os.utime(folder / "other/a.fa", (0, 0))
    done = run(folder, how, fasta="other/a.fa")
    assert done.returncode != 0
    assert "holds the results of a.fa; to embed other/a.fa, rename its dataset" in done.stdout
    assert rules_run(done.stdout) == []


@EACH
def test_the_index_of_a_run_killed_before_the_merge_is_not_used_for_another_file(how: str, folder: Path) -> None:
    for name in ("embeddings.h5", "records.tsv.gz", "manifest.json"):
        embeddings_of(folder).with_name(name).unlink()
    EditedRun.write(EditedRun(folder, random.Random(0)), "a.fa", FASTAS[1].encode(), 30)
    done = run(folder, how)
    assert done.returncode != 0
    assert "results/a/model holds the results of a.fa (23 bytes" in done.stdout


@EACH
def test_an_edited_fasta_is_embedded_again(how: str, folder: Path) -> None:
    (folder / "a.fa").write_text(FASTAS[2])
    done = run(folder, how)
    assert done.returncode == 0, done.stdout
    assert open_embeddings(embeddings_of(folder)).ids == ["x", "y", "b"]
    assert "results/a/model will be computed again: the input was a.fa (23 bytes" in done.stdout


@EACH
def test_settings_are_followed(how: str, folder: Path, tmp_path: Path) -> None:
    settings = Settings("bfloat16", "max", 1, 4, "float16")
    asked = {"precision": "bfloat16", "pooling": "max", "layers": 1, "max_length": 4, "dtype": "float16"}
    done = run(folder, how, **asked)
    assert done.returncode == 0, done.stdout
    expected = EditedRun(tmp_path / "work", random.Random(0), settings)
    os.chdir(folder)
    assert expected.found() == expected.expected()
    for name, value, rules in (
        ("dtype", "float32", ["all", "merge_shards", "report"]),
        ("pooling", "mean", ["all", "embed_shard", "merge_shards", "report"]),
    ):
        asked[name] = value
        done = run(folder, how, **asked)
        assert rules_run(done.stdout) == rules, done.stdout
    again = run(folder, how, **asked)
    assert "Nothing to be done" in again.stdout


@EACH
def test_replaced_weights_are_refused_or_used(how: str, folder: Path) -> None:
    before = np.array(open_embeddings(embeddings_of(folder)).array)
    weights = EditedRun(folder, random.Random(0))
    weights.write("model.pt", checkpoint(1, folder), 30)
    done = run(folder, how)
    assert done.returncode != 0
    assert "holds the results of model.pt (" in done.stdout
    os.utime(folder / "model.pt")
    done = run(folder, KNOWN if how == FORGOTTEN else how)
    assert done.returncode == 0, done.stdout
    assert rules_run(done.stdout) == ["all", "embed_shard", "merge_shards", "report"]
    assert (np.array(open_embeddings(embeddings_of(folder)).array) != before).any()


@EACH
def test_quarantined_records_fail_a_run_that_must_not_skip(how: str, folder: Path) -> None:
    status = next(folder.glob("results/a/model/shards/*.status.json"))
    weights = EditedRun(folder, random.Random(0))
    weights.write("model.pt", checkpoint(0, folder), 3)
    _break_cysteine(folder / "model.pt")
    (folder / "a.fa").write_text(">a\nMKV\n>bad\nMKC\n")
    done = run(folder, how, on_error="skip")
    assert done.returncode == 0, done.stdout
    assert open_embeddings(embeddings_of(folder)).ids == ["a"]
    assert json.loads(status.read_text())["quarantined"]["num_sequences"] == 1
    again = run(folder, KNOWN, on_error="skip")
    assert "Nothing to be done" in again.stdout
    done = run(folder, how)
    assert done.returncode != 0
    assert "sequences were quarantined (1): on_error was skip and is fail now" in done.stdout
    assert "finite embedding" in done.stdout


def test_invalid_records_fail_a_run_or_are_skipped(folder: Path) -> None:
    assert "Nothing to be done" in run(folder, on_invalid="skip").stdout  # a.fa has none
    EditedRun.write(EditedRun(folder, random.Random(0)), "a.fa", b">a\nMKV\n>b\nM-K\n>c\n", 3)
    done = run(folder)
    assert done.returncode != 0
    assert "a/model: a.fa: 2 records are invalid; mend them, or set on_invalid: skip (--on-invalid skip)" in done.stdout
    done = run(folder, on_invalid="skip")
    assert done.returncode == 0, done.stdout
    assert "records:                 1 embedded, 2 rejected" in done.stdout
    assert "INVALID: 2 records of a left out, with a letter that is not allowed or without a sequence" in done.stdout
    assert open_embeddings(embeddings_of(folder)).ids == ["a"]


def _break_cysteine(path: Path) -> None:
    import torch

    content = torch.load(path, weights_only=False)
    content["model"]["encoder.sentence_encoder.embed_tokens.weight"][23] = float("nan")
    torch.save(content, path)


@EACH
def test_two_datasets_in_one_folder_are_refused(how: str, folder: Path) -> None:
    (folder / "b.fa").write_text(FASTAS[2])
    (folder / "results/b").symlink_to("a")
    (folder / "d.tsv").write_text("dataset\tfasta\tmodel\na\ta.fa\nb\tb.fa\n")
    done = run(folder, how, datasets="d.tsv")
    assert done.returncode != 0
    assert "results/b/model and results/a/model are the same folder, through a link" in done.stdout
    assert rules_run(done.stdout) == []


def test_nothing_is_recomputed_needlessly(folder: Path, tmp_path: Path) -> None:
    assert "Nothing to be done" in run(folder).stdout
    os.utime(folder / "a.fa")
    os.utime(folder / "model.pt")
    assert "Nothing to be done" in run(folder).stdout
    assert "Nothing to be done" in run(folder, FORGOTTEN).stdout
    for path in folder.glob("results/**/*.*"):  # like a copy, which changes all times
        os.utime(path, (time.time() - random.Random(str(path)).random() * HOUR,) * 2)
    assert set(rules_run(run(folder).stdout)) <= {"all", "report"}
    folder.rename(tmp_path / "moved")
    assert "Nothing to be done" in run(tmp_path / "moved").stdout
    copy = tmp_path / "repository"
    for name in ("config", "envs", "profiles", "report", "rules", "scripts"):
        shutil.copytree(REPOSITORY / name, copy / name)
    shutil.copy(REPOSITORY / "Snakefile", copy / "Snakefile")
    assert "Nothing to be done" in run(tmp_path / "moved", repository=copy).stdout


def test_a_clock_that_was_set_back_costs_no_computation(folder: Path) -> None:
    """The index is dated in the future, so Snakemake considers the older shards failed and deletes them."""
    results = folder / "results/a/model"
    for path in (*results.glob("shards/*.*"), *results.glob("[!i]*.*")):
        path.unlink()
    index, shard = results / "index.h5", results / "shards/shard_0-of-1.h5"
    later = time.time() + HOUR
    done = run_while(folder, index, later)
    assert done.returncode != 0, "Snakemake has accepted a shard that is older than its index"
    assert not shard.exists()
    done = run(folder)
    assert done.returncode == 0, done.stdout
    status = json.loads(shard.with_suffix(".status.json").read_text())
    assert status["resumed_packs"] == status["num_packs"] > 0


def run_while(folder: Path, index: Path, later: float) -> object:
    """Run, and date the index in the future once the run has started."""
    config = {"fasta": "a.fa", "model": "model.pt", "shards": 1, "precision": "float32", "audit_seconds": 0}
    hook = folder / "hook"
    hook.mkdir()
    # Loaded by the rules' `python`: sets the index's time before the worker starts.
    python = hook / "sitecustomize.py"
    python.write_text(
        "import os, sys\n"
        f"if 'embed_shard.py' in ' '.join(sys.orig_argv): os.utime({str(index)!r}, ({later}, {later}))\n"
    )
    return snakemake(folder, "--retries", "2", config=config, PYTHONPATH=str(hook))


def test_a_dataset_of_the_demo_model(tmp_path: Path) -> None:
    """Untrained weights have no files to compare, so their name is compared."""
    (tmp_path / "a.fa").write_text(FASTAS[0])
    settings = {"fasta": "a.fa", "model": MODEL, "audit_seconds": 0}
    assert snakemake(tmp_path, config=settings).returncode == 0
    shutil.rmtree(tmp_path / ".snakemake")
    assert "Nothing to be done" in snakemake(tmp_path, config=settings).stdout
    assert (tmp_path / "results/a" / SLUG / "embeddings.h5").exists()


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10))
def test_a_run_gives_what_is_asked_for_whatever_was_edited(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like tests/property/test_edited_runs.py, but through Snakemake."""
    monkeypatch.chdir(tmp_path)
    edited = EditedRun(tmp_path, random.Random(f"workflow {seed}"))

    def repeat() -> object:
        settings = {**asdict(edited.settings), "fasta": edited.fasta, "model": "model.pt", "audit_seconds": 0}
        return snakemake(tmp_path, "--retries", "0", config=settings)

    for _ in range(5):
        edited.edit()
        done = repeat()
        if done.returncode:
            assert "holds the results of" in done.stdout, (edited.edits, done.stdout)
            shutil.rmtree("results")
            done = repeat()
        assert done.returncode == 0, (edited.edits, done.stdout)
        assert edited.found() == edited.expected(), edited.edits
