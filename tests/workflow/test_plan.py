"""`snakemake plan` predicts what a run does. It embeds nothing, leaves no files, and changes no result."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import MODEL, REPOSITORY, SCRIPTS
from seqmill.index.build import build_index
from seqmill.spec.lengths import LengthPolicy
from sequences import random_sequences

RESULTS = "results/{}/untrained-esm2_t6_8M_UR50D"
SETTINGS = ("shards=2", "precision=float32", "layers=[2,-1]", "dtype=float16")


def snakemake(folder: Path, *arguments: str, settings: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    """Run the workflow without a terminal; return its standard output and the rules that ran."""
    command = [str(Path(sys.executable).with_name("snakemake")), "--snakefile", str(REPOSITORY / "Snakefile")]
    command += ["--directory", str(folder), "--cores", "2", *arguments, "--config", *SETTINGS, *settings]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout, sorted(re.findall(r"^(?:local)?rule (\w+):$", done.stderr, re.MULTILINE))


def states_in(folder: Path) -> dict[Path, tuple[int, int] | None]:
    """Return the time and size of every file below a folder, and None for every subfolder."""
    found = {path: path.stat() for path in sorted(folder.rglob("*"))}
    return {path: (now.st_mtime_ns, now.st_size) if path.is_file() else None for path, now in found.items()}


def plan_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPTS / "plan.py", *arguments, "--seconds", 0, "--device", "cpu"]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """Plan two datasets, of 30 and 2 proteins; return the folder, the output, and the rules that ran."""
    folder = tmp_path_factory.mktemp("work") / "a folder"
    (folder / "config").mkdir(parents=True)
    rows = ["dataset\tfasta\tmodel"]
    for name, lengths in (("many", range(20, 320, 10)), ("two", (30, 40))):
        records = [f">{name}{number}\n{s}\n" for number, s in enumerate(random_sequences([*lengths]))]
        (folder / f"{name}.faa").write_text("".join(records))
        rows.append(f"{name}\t{name}.faa\t{MODEL}")
    (folder / "config/datasets.tsv").write_text("\n".join(rows) + "\n")
    return folder, *snakemake(folder, "plan")


def test_the_plan_is_printed_and_leaves_no_files(planned: tuple[Path, str, list[str]]) -> None:
    folder, printed, rules = planned
    assert rules == ["plan", "plan_shards", "plan_shards"]
    many, two = (dict(re.findall(r"^(\S+) +(.*)$", part, re.MULTILINE)) for part in printed.strip().split("\n\n"))
    assert (many["fasta"], two["fasta"]) == ("many.faa", "two.faa")
    assert many["records"] == "30: 30 embedded"
    assert ", float32, attention " in many["device"]
    assert {"index", "speed", "time", "memory", "disk"} <= many.keys()
    assert f"free on the disk of {folder / RESULTS.format('many')}\n" in printed
    assert "1 shards have no work" in printed  # two proteins in one pack, two shards
    assert not (folder / "results").exists()
    # A plan does not count as a run.
    (folder / "results").mkdir()
    watch = [sys.executable, str(SCRIPTS / "watch.py"), "--once", str(folder / "results")]
    assert "no run has begun in this folder" in subprocess.run(watch, capture_output=True, text=True).stderr


def test_a_run_does_what_was_planned(planned: tuple[Path, str, list[str]]) -> None:
    folder, printed, _ = planned
    _, rules = snakemake(folder)
    assert (rules.count("build_index"), rules.count("embed_shard")) == (2, 4)
    manifest = json.loads((folder / RESULTS.format("many") / "manifest.json").read_text())
    assert f"{manifest['counts']['num_tokens']:,} tokens\n" in printed
    tokens = [shard["run"]["num_tokens"] for shard in manifest["shards"]]
    assert f" packs and {min(tokens):,} to {max(tokens):,} tokens in each\n" in printed
    assert sum(tokens) == manifest["counts"]["num_tokens"]


def test_a_plan_with_other_settings_leaves_finished_results_alone(planned: tuple[Path, str, list[str]]) -> None:
    folder, before_run, _ = planned
    snakemake(folder)  # finish the results if they are not
    before = states_in(folder / "results")
    printed, rules = snakemake(folder, "plan", settings=("max_length=90", "shards=3"))
    assert rules == ["plan", "plan_shards", "plan_shards"]
    assert re.search(r"^records +30: 8 embedded, 22 truncated$", printed, re.MULTILINE)
    assert printed.count("tokens/s") == 2
    assert states_in(folder / "results") == before
    again, _ = snakemake(folder, "plan")  # for the settings of the results, measured again
    assert again.count("tokens/s") == 2
    counts = r"^(?:records|unique|longest|packs|shards|balance) .*$"
    assert re.findall(counts, again, re.MULTILINE) == re.findall(counts, before_run, re.MULTILINE)
    _, rules = snakemake(folder)
    assert rules == []
    assert states_in(folder / "results") == before


def test_a_plan_refuses_what_a_run_would_refuse(planned: tuple[Path, str, list[str]]) -> None:
    folder, *_ = planned
    snakemake(folder)  # finish the results if they are not
    earlier = folder / RESULTS.format("two") / "embeddings.h5"  # layers 2 and 6, computed in float32, stored as float16
    fasta = ("--fasta", folder / "many.faa", "--model", MODEL, "--results", folder, "--reuse", earlier)
    fits = ("--layers", 2, -1, "--dtype", "float16")
    refused = [
        (("--layers", 3, *fits[3:]), "it has layers=2,6, this computation layers=3"),
        ((*fits, "--pooling", "cls"), "it has pooling=mean, this computation pooling=cls"),
        ((*fits, "--precision", "bfloat16"), "it has precision=float32, this computation precision=bfloat16"),
        ((*fits, "--max-length", 90), "it has max_length=1022, this computation max_length=90"),
        (fits[:3], "its vectors are rounded to float16, and dtype is float32"),
        ((*fits, "--per-residue", "float16"), "vectors of residues are not taken from earlier results"),
    ]
    for arguments, said in refused:
        done = plan_script(*fasta, *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{earlier}: can't be reused: {said}" in done.stderr
    done = plan_script(*fasta, *fits, "--precision", "float32")
    assert done.returncode == 0, done.stderr
    assert list(folder.glob("seqmill-plan-*")) == []

    gone = plan_script(*fasta, folder / "gone.h5", *fits)
    assert f"{folder / 'gone.h5'}: no such file, and its vectors are to be reused; bring it back" in gone.stderr

    index = folder / "index.h5"
    build_index(folder / "many.faa", index, MODEL, LengthPolicy(), [earlier])
    for arguments, said in refused:
        if "--max-length" not in arguments:  # the index sets it
            assert f"{earlier}: can't be reused: {said}" in plan_script("--index", index, *arguments).stderr
    assert plan_script("--index", index, *fits).returncode == 0
