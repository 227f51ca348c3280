"""The workflow as a module of another one: renamed rules, a prefix, pathvars, FASTA files that other rules make."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import MODEL, REPOSITORY, run_script
from seqmill import open_embeddings

SLUG = "untrained-esm2_t6_8M_UR50D"
# `cd` would fail if seqmill put its prefix (exec) before the shell commands of all rules. $ORFS stands for an input.
OUTER = """
configfile: "settings.yaml"

rule all:
    input: "counts.txt"

rule predict:
    input: "genome.txt"
    output: "orfs/phages.faa"
    shell: "cd orfs; cp ../{input} phages.faa"

module seqmill:
    snakefile: "%s"
    config: config["embeddings"]
    %s

use rule * from seqmill as emb_*

use rule embed_shard from seqmill as emb_embed_shard with:
    threads: 1

rule count:
    input: "%s"
    output: "counts.txt"
    shell: "cd .; wc -c {input} > {output}"
"""


def write_workflow(folder: Path, module: str, embeddings: str, settings: str) -> None:
    """Write a workflow that counts the bytes of `embeddings`; `module` is more of the module statement."""
    folder.mkdir(exist_ok=True)
    (folder / "Snakefile").write_text(OUTER % (REPOSITORY / "workflow/Snakefile", module, embeddings))
    (folder / "settings.yaml").write_text(settings)
    (folder / "genome.txt").write_text(">a\nMKV\n>b\nMKLV\n")


def snakemake(folder: Path, *arguments: str, fails: bool = False) -> str:
    """Run the workflow in a folder without an activated environment, and return what it printed."""
    program = Path(sys.executable).with_name("snakemake")
    environment = {**os.environ, "PATH": "/usr/local/bin:/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(program), "--cores", "2", *arguments],
        **{"cwd": folder, "env": environment, "text": True},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def files(folder: Path) -> set[str]:
    """Return the folders and files at the top, but Snakemake's own."""
    return {path.name for path in folder.iterdir()} - {".snakemake"}


def test_the_other_workflow_makes_the_fasta(tmp_path: Path) -> None:
    embeddings = f"results/phages/{SLUG}/embeddings.h5"
    write_workflow(tmp_path, "", embeddings, f"embeddings: {{fasta: orfs/phages.faa, model: '{MODEL}', shards: 2}}\n")
    output = snakemake(tmp_path)
    assert "rule emb_embed_shard:" in output
    assert open_embeddings(tmp_path / embeddings).ids == ["a", "b"]
    assert "Nothing to be done" in snakemake(tmp_path)
    said = snakemake(tmp_path, f"results/phage/{SLUG}/embeddings.h5", "--dry-run", fails=True)
    assert f"no dataset has the results phage/{SLUG}; there are phages/{SLUG}" in said
    settings = (tmp_path / "settings.yaml").read_text()
    (tmp_path / "settings.yaml").write_text(settings.replace("orfs/phages.faa", "other/phages.faa"))
    said = snakemake(tmp_path, "--dry-run", fails=True)
    assert "holds the results of orfs/phages.faa, and other/phages.faa does not exist (yet): correct the path" in said
    (tmp_path / "settings.yaml").write_text("embeddings: {shards: 2}\n")
    said = snakemake(tmp_path, "--dry-run", fails=True)
    assert "seqmill: nothing to embed: the config of the module has neither datasets nor fasta" in said
    (tmp_path / "settings.yaml").write_text(settings)
    # A FASTA that is made again in this run, after seqmill has compared it, is embedded again in this run.
    (tmp_path / "genome.txt").write_text(">a\nMKV\n>c\nMKLV\n")
    snakemake(tmp_path)
    assert open_embeddings(tmp_path / embeddings).ids == ["a", "c"]


def test_a_prefix_is_for_what_seqmill_makes(tmp_path: Path) -> None:
    embeddings = f"deep/er/results/phages/{SLUG}/embeddings.h5"
    datasets = f"{{phages: orfs/phages.faa, hosts: {{fasta: hosts.faa, model: '{MODEL}'}}}}"
    settings = f"embeddings: {{model: '{MODEL}', datasets: {datasets}}}\n"
    write_workflow(tmp_path, 'prefix: "deep/er"', embeddings, settings)
    (tmp_path / "hosts.faa").write_text(">h\nMKVV\n")
    snakemake(tmp_path, "all", "emb_all")
    assert open_embeddings(tmp_path / embeddings).ids == ["a", "b"]
    assert open_embeddings(tmp_path / f"deep/er/results/hosts/{SLUG}/embeddings.h5").ids == ["h"]
    assert files(tmp_path / "deep/er") == {"results", "logs"}
    assert files(tmp_path) == {*("Snakefile", "settings.yaml", "genome.txt", "orfs", "hosts.faa", "counts.txt", "deep")}
    assert "Nothing to be done" in snakemake(tmp_path, "all", "emb_all")
    done = run_script("doctor.py", "deep/er/results", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    # A change of one dataset is none of the other, whose FASTA a rule makes; nor is a dry run with other settings.
    settings = (tmp_path / "settings.yaml").read_text()
    (tmp_path / "settings.yaml").write_text(settings.replace("{model", "{per_residue: true, model"))
    assert "emb_embed_shard    " in snakemake(tmp_path, "all", "emb_all", "--dry-run")
    (tmp_path / "settings.yaml").write_text(settings)
    assert "Nothing to be done" in snakemake(tmp_path, "all", "emb_all", "--dry-run")
    # The doctor knows the FASTA file, whose path starts at the workflow and not below the prefix.
    (tmp_path / "hosts.faa").write_text(">h\nMKVVV\n")
    assert "the input has changed" in run_script("doctor.py", "deep/er/results", cwd=tmp_path).stdout


@pytest.mark.parametrize("settings", ["pathvars: {{results: out, logs: notes}}\nembeddings: {0}", "embeddings: {0}"])
def test_pathvars_move_results_logs_and_benchmarks(tmp_path: Path, settings: str) -> None:
    of_module = f"fasta: orfs/phages.faa, model: '{MODEL}'"
    if "pathvars" not in settings:
        of_module += ", pathvars: {results: out, logs: notes, benchmarks: times}"
    write_workflow(tmp_path, "", f"out/phages/{SLUG}/embeddings.h5", settings.format("{" + of_module + "}"))
    output = snakemake(tmp_path, "--dry-run")
    assert f"log: notes/phages/{SLUG}/build_index.log" in output
    benchmarks = "notes/benchmarks" if settings.startswith("pathvars") else "times"
    assert f"benchmark: {benchmarks}/phages/{SLUG}/build_index.benchmark.tsv" in output
    assert f"log: out/phages/{SLUG}/shards/shard_0-of-1.status.json, notes/phages" in output
