"""Snakemake runs the workflow: the demo, reruns, user data, failures, and wrong input."""

import csv
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from families import dnabert_folder
from pipeline import CONTIGS_DEMO, DEMO, IMPATIENT, MODEL, REPOSITORY, Run
from reference import fair_esm_model, save_checkpoint
from seqmill import open_embeddings
from seqmill.run.slurm_jobs import claim_folder
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import MODELS
from seqmill.spec.released import release_of

BIN = Path(sys.executable).parent
SLUG = "untrained-esm2_t6_8M_UR50D"


def snakemake(
    folder: Path,
    *arguments: str,
    config: dict[str, object] | None = None,
    repository: Path = REPOSITORY,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run the workflow in `folder`; `stdout` has both output streams."""
    settings = [f"{key}={value}" for key, value in (config or {}).items()]
    command = [str(BIN / "snakemake"), "--snakefile", str(repository / "Snakefile"), "--directory", str(folder)]
    command += ["--cores", "2", *arguments, *(["--config", *settings] if settings else [])]
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=repository,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def rules_run(output: str) -> list[str]:
    return sorted(re.findall(r"^(?:local)?rule (\w+):$", output, re.MULTILINE))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of the demo in two shards, in a folder with a space in its name, and Snakemake's output."""
    folder = tmp_path_factory.mktemp("work") / "a folder"
    (folder / "config").mkdir(parents=True)
    header, proteins, *_ = (REPOSITORY / "config/datasets.tsv").read_text().splitlines()
    (folder / "config/datasets.tsv").write_text(f"{header}\n{proteins}\n")  # the contigs take longer
    done = snakemake(folder, "--printshellcmds", config={"shards": 2, "precision": "float32"})
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


def test_the_demo_makes_verified_results(demo: tuple[Path, str], tmp_path: Path) -> None:
    folder, output = demo
    assert rules_run(output) == ["all", "build_index", "embed_shard", "embed_shard", "merge_shards", "report"]
    results = folder / "results/demo" / SLUG
    assert {path.name for path in results.iterdir()} == {
        *("index.h5", "shards", "embeddings.h5", "records.tsv.gz", "manifest.json", "report.html")
    }
    embeddings = open_embeddings(results / "embeddings.h5")
    assert len(embeddings) == 85
    assert embeddings.ids[0] == "gi|7525080|ref|NP_051037.1|"
    # The same bits as one shard without Snakemake.
    alone = Run(tmp_path, 1).build(DEMO).embed("float32").merge()
    assert (open_embeddings(alone.embeddings)[:] == embeddings[:]).all()
    with gzip.open(results / "records.tsv.gz", "rt") as table:
        assert len(table.readlines()) == 86


def test_the_demo_says_where_results_are_and_that_they_mean_nothing(demo: tuple[Path, str]) -> None:
    folder, output = demo
    assert f"results/demo/{SLUG}/embeddings.h5" in output
    assert "seqmill.open_embeddings(" in output
    assert "UNTRAINED WEIGHTS" in output
    log = folder / "logs/demo" / SLUG / "embed_shard_0-of-2.log"
    assert "UNTRAINED WEIGHTS" in log.read_text()
    assert "UNTRAINED" in open_embeddings(folder / "results/demo" / SLUG / "embeddings.h5").attrs["warning"]


def test_a_second_run_does_nothing(demo: tuple[Path, str]) -> None:
    done = snakemake(demo[0], config={"shards": 2, "precision": "float32"})
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout
    # Another device does not make results stale.
    done = snakemake(demo[0], config={"shards": 2, "precision": "float32", "device": "cpu"})
    assert "Nothing to be done" in done.stdout


def test_only_a_deleted_shard_is_recomputed(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    results = folder / "results/demo" / SLUG
    before = open_embeddings(results / "embeddings.h5")[:]
    (results / "shards/shard_1-of-2.h5").unlink()
    done = snakemake(folder, config={"shards": 2, "precision": "float32"})
    assert done.returncode == 0, done.stdout
    assert rules_run(done.stdout) == ["all", "embed_shard", "merge_shards", "report"]
    assert "rank=1" in done.stdout
    assert (open_embeddings(results / "embeddings.h5")[:] == before).all()


def test_the_printed_commands_can_be_pasted(demo: tuple[Path, str], tmp_path: Path) -> None:
    before = open_embeddings(demo[0] / "results/demo" / SLUG / "embeddings.h5")[:]
    folder, output = tmp_path / "a copy", demo[1]
    shutil.copytree(demo[0], folder)
    results = folder / "results/demo" / SLUG
    (results / "embeddings.h5").unlink()
    commands = re.findall(r"^ *(?:Shell command: )?(python .*\.py.*)$", output, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        assert shlex.split(command)[0] == "python"
        environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run(["bash", "-c", command], cwd=folder, env=environment, check=True)
    assert (open_embeddings(results / "embeddings.h5")[:] == before).all()


def test_a_fasta_with_an_odd_name(tmp_path: Path) -> None:
    fasta = tmp_path / "my proteins (v1).faa.gz"
    fasta.write_bytes(gzip.compress(b">x/1 first\nMKVLAA*\n>x/1\nMKJ\n>y\nmkvlaa\n"))
    work = tmp_path / "work"
    work.mkdir()
    done = snakemake(work, config={"fasta": fasta, "model": MODEL, "shards": 3})
    assert done.returncode == 0, done.stdout
    embeddings = open_embeddings(work / "results/my_proteins_v1_" / SLUG / "embeddings.h5")
    assert embeddings.ids == ["x/1", "x/1", "y"]
    assert (embeddings[0] == embeddings[2]).all()
    assert json.loads(embeddings.attrs["letter_counts"]) == {
        **{"lower_case": 6, "trailing_stop": 1, "inner_stop_to_x": 0, "j_to_x": 1}
    }


def test_a_table_of_several_datasets_and_a_custom_config(tmp_path: Path) -> None:
    (tmp_path / "one.faa").write_text(">a\nMKV\n")
    (tmp_path / "two.faa").write_text(">b\n" + "MKVL" * 9 + "\n>c\nMM\n")
    (tmp_path / "table.tsv").write_text(f"dataset\tfasta\tmodel\none\tone.faa\t{MODEL}\ntwo\ttwo.faa\n")
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text(
        f"datasets: table.tsv\nmodel: {MODEL}\nmax_length: 30\nlong_sequences: reject\n"
    )
    done = snakemake(tmp_path)
    assert done.returncode == 0, done.stdout
    assert open_embeddings(tmp_path / "results/one" / SLUG / "embeddings.h5").ids == ["a"]
    assert open_embeddings(tmp_path / "results/two" / SLUG / "embeddings.h5").ids == ["c"]
    with gzip.open(tmp_path / "results/two" / SLUG / "records.tsv.gz", "rt") as table:
        assert "\trejected\t\t\tlonger than max_length=30\t" in table.read()


def test_proteins_and_nucleotides_in_one_table(tmp_path: Path) -> None:
    """Both match runs without Snakemake; the nucleotides have windows on both strands."""
    model = dnabert_folder()
    (tmp_path / "table.tsv").write_text(
        f"dataset\tfasta\tmodel\nproteins\t{DEMO}\t{MODEL}\ncontigs\t{CONTIGS_DEMO}\t{model}\n"
    )
    settings = {"datasets": "table.tsv", "shards": 2, "precision": "float32", "strand": "both"}
    done = snakemake(tmp_path, config={**settings, "window": 1000, "stride": 600, "audit_seconds": 1})
    assert done.returncode == 0, done.stdout
    steps = ["build_index", "embed_shard", "embed_shard", "merge_shards", "report"]
    assert rules_run(done.stdout) == sorted(["all", *steps, *steps])
    policy = LengthPolicy("window", 1000, 1000, 600, "both")
    for name, slug, fasta, which, longest in (
        ("proteins", SLUG, DEMO, MODEL, LengthPolicy("window", 1000, 1000, 600)),
        ("contigs", model.name, CONTIGS_DEMO, str(model), policy),
    ):
        results = tmp_path / "results" / name / slug
        alone = Run(tmp_path / f"{name} alone", 1).build(fasta, which, longest).embed().merge()
        found, expected = open_embeddings(results / "embeddings.h5"), open_embeddings(alone.embeddings)
        assert found.ids == expected.ids
        assert (found[:] == expected[:]).all()
        assert found.attrs["audit_worst_cosine"] > 0.9999
        with gzip.open(results / "records.tsv.gz", "rt") as table:
            rows = list(csv.DictReader(table, delimiter="\t"))
        assert [row["id"] for row in rows] == found.ids
    # `rows` and `found` are the contigs', from the last iteration.
    assert {row["fate"] for row in rows} == {"embedded", "windowed", "duplicate"}
    assert all((int(row["windows"]) > 1) == (int(row["length"]) > 1000) for row in rows)
    assert (found.attrs["window"], found.attrs["stride"], found.attrs["strand"]) == (1000, 600, "both")
    assert json.loads(found.attrs["letter_counts"])["n"] > 0
    again = snakemake(tmp_path, config={**settings, "window": 1000, "stride": 600})
    assert "Nothing to be done" in again.stdout


def test_a_failing_shard_reports_its_error(tmp_path: Path) -> None:
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 this is no checkpoint")
    (tmp_path / "p.faa").write_text(">a\nMKV\n")
    done = snakemake(tmp_path, config={"fasta": "p.faa", "model": "broken.pt", "shards": 2})
    assert done.returncode != 0
    for rank in range(2):
        status = json.loads((tmp_path / f"results/p/broken/shards/shard_{rank}-of-2.status.json").read_text())
        assert status["status"] == "failed"
        assert status["attempt"] == 3  # the profile sets two retries
        assert "cannot be loaded as a fair-esm checkpoint" in status["error"]["message"]
    assert not list((tmp_path / "results/p/broken/shards").glob("*.h5"))
    assert not (tmp_path / "results/p/broken/embeddings.h5").exists()
    assert "cannot be loaded as a fair-esm checkpoint" in done.stdout
    assert "shard_0-of-2.status.json" in done.stdout
    assert "Traceback" not in done.stdout
    assert len(re.findall(r"^  p/broken: .*cannot be loaded as a fair-esm checkpoint", done.stdout, re.MULTILINE)) == 1


def test_a_folder_is_in_use_until_the_run_ends(tmp_path: Path) -> None:
    """A second run there would cancel this run's SLURM jobs if it thought this run was dead."""
    command = [str(BIN / "snakemake"), "--snakefile", str(REPOSITORY / "Snakefile"), "--directory", str(tmp_path)]
    (tmp_path / "p.faa").write_text(">a\nMKV\n>b\nMKLV\n")
    command += ["--cores", "2", "--config", "fasta=p.faa", f"model={MODEL}"]
    said = tmp_path / "said.txt"
    with said.open("w") as output:
        run = subprocess.Popen(command, stdout=output, stderr=output, cwd=REPOSITORY)
        try:
            while not list(tmp_path.glob("results/*/*/index.h5")):  # the first job has ended, others follow
                assert run.poll() is None, said.read_text()
                time.sleep(0.1)
            claim, alone = claim_folder(tmp_path)
            claim.close()
            assert not alone
            assert run.wait() == 0, said.read_text()
        finally:
            run.kill()
    claim, alone = claim_folder(tmp_path)
    claim.close()
    assert alone


def test_a_bad_record_stops_the_run_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "p.faa").write_text(">good\nMKV\n>bad one\nMK-V\n")
    done = snakemake(tmp_path, "--retries", "0", config={"fasta": "p.faa", "model": MODEL})
    assert done.returncode != 0
    assert "p.faa: record 2 ('bad'): '-' at residue 3" in done.stdout
    assert "alignment" in done.stdout
    assert "Traceback" not in done.stdout
    assert not list((tmp_path / "results").rglob("*.h5"))


def test_the_failed_dataset_is_named_at_the_end(tmp_path: Path) -> None:
    for name, sequence in (("one", "MKV"), ("two", "MK-V")):
        (tmp_path / f"{name}.faa").write_text(f">x\n{sequence}\n")
    (tmp_path / "d.tsv").write_text("dataset\tfasta\tmodel\none\tone.faa\ntwo\ttwo.faa\n")
    done = snakemake(tmp_path, "--retries", "0", "--keep-going", config={"datasets": "d.tsv", "model": MODEL})
    assert done.returncode != 0
    _, _, end = done.stdout.partition("\nFailed:\n")
    lines = end.splitlines()
    assert lines[0].startswith(f"  two/{SLUG}: ")
    assert "record 1 ('x'): '-' at residue 3" in lines[0]
    assert lines[1].startswith("See more: ")
    command = lines[1].removeprefix("See more: ")
    path = f"{BIN}:{os.environ['PATH']}"
    said = subprocess.run(
        command, shell=True, cwd=tmp_path, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, text=True
    )
    assert said.returncode == 1
    assert f"two/{SLUG}: failed\n" in said.stdout
    assert f"one/{SLUG}: complete\n" in said.stdout

    # At once another run, in which another dataset fails; the log of `two` is still the one with the error.
    (tmp_path / "three.faa").write_text(">x\nMK-V\n")
    with (tmp_path / "d.tsv").open("a") as table:
        table.write("three\tthree.faa\n")
    target = f"results/three/{SLUG}/index.h5"
    done = snakemake(tmp_path, target, "--retries", "0", config={"datasets": "d.tsv", "model": MODEL})
    assert done.returncode != 0
    failed, _ = done.stdout.partition("\nFailed:\n")[2].split("See more: ")
    assert failed.startswith(f"  three/{SLUG}: ")
    assert failed.count("\n") == 1


PROTEIN = {"fasta": "good.faa", "model": MODEL}
CONTIG = {"fasta": "good.fna", "model": "untrained:dnabert_s"}
WRONG = {
    "no such file": ({"fasta": "none.faa"}, "none.faa: no such FASTA file"),
    "a folder": ({"fasta": "."}, "is a folder"),
    "empty file": ({"fasta": "empty.faa"}, "the file is empty"),
    "not FASTA": ({"fasta": "text.txt"}, "not a FASTA file"),
    "unknown model": ({"fasta": "good.faa", "model": "esm2_t33_650M"}, "did you mean esm2_t33_650M_UR50D?"),
    "no such checkpoint": ({"fasta": "good.faa", "model": "no/such.pt"}, "model no/such.pt"),
    "unknown key": ({"modle": "x"}, "config modle: there is no such setting; did you mean model?"),
    "unknown device": ({"device": "gpu"}, "config device: 'gpu' is not allowed; give auto, cpu, cuda"),
    "no shards": ({"shards": 0}, "config shards: 0"),
    "length in words": (
        {"max_length": "long"},
        "config max_length: 'long' is not allowed; give auto, or",
    ),
    "a layer too many": (
        {**PROTEIN, "layers": 7},
        "dataset good, model untrained:esm2_t6_8M_UR50D: layer 7: the model has layers 0 to 6, or -7 to -1",
    ),
    "a layer twice": ({**PROTEIN, "layers": "[6,-1]"}, "layers must be one or more, each once, not 6, 6"),
    "very much overlap": ({**CONTIG, "stride": 1}, "stride must be at least a 64th of the window of 10000, not 1"),
    "stride beyond the window": (
        {**CONTIG, "window": 100, "stride": 101},
        "stride must be 1 to 100 residues or bases, no longer than the window",
    ),
    "window beyond max_length": (
        {**CONTIG, "window": 100, "max_length": 99},
        "window must be 1 to 99 residues or bases, no longer than max_length",
    ),
    "unknown strand": ({**CONTIG, "strand": "reverse"}, "config strand: 'reverse' is not allowed; give forward, both"),
    "unknown pooling": ({**CONTIG, "pooling": "sum"}, "config pooling: 'sum' is not allowed; give mean, "),
    "no table": ({"datasets": "none.tsv"}, "none.tsv: no such table of datasets"),
    "braces": ({"fasta": "a{b}.faa"}, "a{b}.faa: Snakemake takes braces for wildcards"),
    "a folder without weights": ({"fasta": "good.faa", "model": "folder"}, "the folder has no .safetensors file"),
    "residues that are not there": ({**PROTEIN, "exports": ["h5_residues"]}, "exports: h5_residues needs per_residue"),
    "color without a table": ({**PROTEIN, "color": "kind"}, "metadata and color go together"),
    "no such column": (
        {**PROTEIN, "metadata": "kinds.tsv", "color": "colour"},
        "kinds.tsv: has no column 'colour'; the columns after the ids are: kind",
    ),
    "bad table": ({"datasets": "bad.tsv"}, "bad.tsv: line 3: nothing.faa: no such FASTA file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_found_before_any_rule_runs(name: str, tmp_path: Path) -> None:
    (tmp_path / "good.faa").write_text(">a\nMKV\n")
    (tmp_path / "good.fna").write_text(">a\nACGT\n")
    (tmp_path / "a{b}.faa").write_text(">a\nMKV\n")
    (tmp_path / "empty.faa").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").write_text('{"model_type": "esm"}')
    (tmp_path / "text.txt").write_text("Dear all,\n")
    (tmp_path / "kinds.tsv").write_text("id\tkind\na\thelix\n")
    (tmp_path / "bad.tsv").write_text(f"dataset\tfasta\tmodel\na\tgood.faa\t{MODEL}\nb\tnothing.faa\t{MODEL}\n")
    config, message = WRONG[name]
    done = snakemake(tmp_path, config=config)
    assert done.returncode != 0
    assert message in done.stdout
    assert "Traceback" not in done.stdout
    assert 'File "' not in done.stdout
    assert rules_run(done.stdout) == []
    assert not (tmp_path / "results").exists()


def test_auto_continues_with_existing_shards(demo: tuple[Path, str], tmp_path: Path) -> None:
    """On a node with other GPUs, or none, finished shards are not computed again."""
    for gpus in ("", "0,1,2"):
        done = snakemake(demo[0], "--dry-run", config={"precision": "float32"}, CUDA_VISIBLE_DEVICES=gpus)
        assert "Nothing to be done" in done.stdout, gpus
    done = snakemake(tmp_path, "--dry-run", CUDA_VISIBLE_DEVICES="0,1,2")
    assert "shard_2-of-3.h5" in done.stdout
    assert "gpu=1" in done.stdout


def test_results_of_another_file_are_not_overwritten(tmp_path: Path) -> None:
    for folder, sequence in (("one", "MKV"), ("two", "MKL")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.faa").write_text(f">a\n{sequence}\n")
    done = snakemake(tmp_path, config={"fasta": "one/same.faa", "model": MODEL})
    assert done.returncode == 0, done.stdout
    before = (tmp_path / "results/same" / SLUG / "embeddings.h5").read_bytes()
    done = snakemake(tmp_path, config={"fasta": "two/same.faa", "model": MODEL})
    assert done.returncode != 0
    assert "holds the results of one/same.faa; to embed two/same.faa" in done.stdout
    assert (tmp_path / "results/same" / SLUG / "embeddings.h5").read_bytes() == before
    # A moved file is still the same file.
    (tmp_path / "one/same.faa").rename(tmp_path / "same.faa")
    assert snakemake(tmp_path, "--dry-run", config={"fasta": "same.faa", "model": MODEL}).returncode == 0


def test_snakemake_without_activating_the_environment(tmp_path: Path) -> None:
    """The rules' `python` is the interpreter that runs Snakemake."""
    (tmp_path / "p.faa").write_text(">a\nMKV\n")
    done = snakemake(tmp_path, config={"fasta": "p.faa", "model": MODEL}, PATH="/usr/bin:/bin")
    assert done.returncode == 0, done.stdout


def test_fetch_models_without_a_released_model_says_so(tmp_path: Path) -> None:
    (tmp_path / "p.faa").write_text(">a\nMKV\n")
    done = snakemake(tmp_path, "fetch_models", config={"fasta": "p.faa", "model": MODEL})
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == f"seqmill: nothing to fetch: no dataset uses a released model, only {MODEL}"


def test_the_user_s_weights_are_used_and_named_by_fetch_models(tmp_path: Path) -> None:
    (tmp_path / "p.faa").write_text(">a\nMKV\n")
    name = "esm2_t6_8M_UR50D"
    weights = tmp_path / f"user/{name}.pt"
    weights.parent.mkdir()
    save_checkpoint(fair_esm_model(MODELS[name]), weights)
    settings, user = {"fasta": "p.faa", "model": f"facebook/{name}", "device": "cpu"}, str(weights.parent)
    done = snakemake(tmp_path, "fetch_models", config=settings, SEQMILL_MODELS=user)
    assert done.returncode == 0, done.stdout
    assert f"seqmill: {name}: on this disk already: {weights}" in done.stdout
    assert "Nothing to be done" in done.stdout
    done = snakemake(tmp_path, config=settings, SEQMILL_MODELS=user)
    assert done.returncode == 0, done.stdout
    assert "fetch_weights" not in rules_run(done.stdout)
    assert open_embeddings(tmp_path / f"results/p/{name}/embeddings.h5").ids == ["a"]
    assert not (tmp_path / "resources").exists()


def test_a_model_of_the_hub_must_be_fetched_first(tmp_path: Path) -> None:
    (tmp_path / "p.faa").write_text(">a\nMKV\n")
    done = snakemake(tmp_path, config={"fasta": "p.faa", "model": "lab/tuned"})
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert re.search("seqmill: model lab/tuned: no such folder.* run `.*fetch.* lab/tuned` and give the folder", last)


def test_weights_put_in_place_by_hand_are_kept(tmp_path: Path) -> None:
    """Two of the three files exist, and one of them is not the published file."""
    (tmp_path / "c.fna").write_text(">a\nACGT\n")
    folder = tmp_path / "resources/models/dnabert_s"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    # Port 9 (discard) is closed on any machine that could run this.
    settings = {"fasta": "c.fna", "model": "dnabert_s"}
    done = snakemake(
        tmp_path, "fetch_models", config=settings, SEQMILL_WEIGHTS_URL="http://127.0.0.1:9", PYTHONPATH=IMPATIENT
    )
    assert done.returncode != 0
    assert "config.json: not that of dnabert_s as published: it has 2 bytes, not 1,025" in done.stdout
    assert (folder / "config.json").read_text() == "{}"
    assert (folder / "pytorch_model.bin").read_bytes() == b"weights"


def test_each_released_model_s_files_are_fetched_by_its_rule(tmp_path: Path) -> None:
    (tmp_path / "p.faa").write_text(">a\nMKV\n")
    (tmp_path / "c.fna").write_text(">a\nACGT\n")
    models = ["esm2_t6_8M_UR50D", "esmc_6b", "prostt5", "dnabert_s"]
    rows = [f"{model}\t{'c.fna' if model == 'dnabert_s' else 'p.faa'}\t{model}" for model in models]
    (tmp_path / "d.tsv").write_text("\n".join(["dataset\tfasta\tmodel", *rows]) + "\n")
    nowhere = str(tmp_path / "none")
    done = snakemake(tmp_path, "fetch_models", "--dry-run", config={"datasets": "d.tsv"}, SEQMILL_MODELS=nowhere)
    assert done.returncode == 0, done.stdout
    rules = ["fetch_dnabert_s", "fetch_esmc_6b", "fetch_models", "fetch_prostt5", "fetch_weights"]
    assert rules_run(done.stdout) == rules
    for file in release_of("esmc_6b").files:
        assert f"resources/models/esmc_6b/{file}" in done.stdout
