"""`snakemake plan`: what it says is what a run then does; nothing is embedded, and nothing stays but the index."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import MODEL, REPOSITORY
from sequences import random_sequences

RESULTS = "results/{}/untrained-esm2_t6_8M_UR50D"
SETTINGS = ("shards=2", "precision=float32", "layers=[2,-1]", "dtype=float16")


def snakemake(folder: Path, *arguments: str) -> tuple[str, list[str]]:
    """Run the workflow without a terminal; return what it printed, and the rules that ran."""
    command = [str(Path(sys.executable).with_name("snakemake")), "--snakefile", str(REPOSITORY / "Snakefile")]
    command += ["--directory", str(folder), "--cores", "2", *arguments, "--config", *SETTINGS]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout, sorted(re.findall(r"^(?:local)?rule (\w+):$", done.stderr, re.MULTILINE))


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """A folder where two datasets, of 30 and of 2 proteins, were planned; what was printed, the rules that ran."""
    folder = tmp_path_factory.mktemp("work") / "a folder"
    (folder / "config").mkdir(parents=True)
    rows = ["dataset\tfasta\tmodel"]
    for name, lengths in (("many", range(20, 320, 10)), ("two", (30, 40))):
        records = [f">{name}{number}\n{s}\n" for number, s in enumerate(random_sequences([*lengths]))]
        (folder / f"{name}.faa").write_text("".join(records))
        rows.append(f"{name}\t{name}.faa\t{MODEL}")
    (folder / "config/datasets.tsv").write_text("\n".join(rows) + "\n")
    return folder, *snakemake(folder, "plan")


def test_the_plan_is_printed_and_only_the_index_stays(planned: tuple[Path, str, list[str]]) -> None:
    folder, printed, rules = planned
    assert rules == ["build_index", "build_index", "plan", "plan_shards", "plan_shards"]
    many, two = (dict(re.findall(r"^(\S+) +(.*)$", part, re.MULTILINE)) for part in printed.strip().split("\n\n"))
    assert (many["fasta"], two["fasta"]) == ("many.faa", "two.faa")
    assert many["records"] == "30: 30 embedded"
    assert ", float32, attention sdpa" in many["device"]
    assert {"index", "speed", "time", "memory", "disk"} <= many.keys()
    assert "1 shards have no work" in printed  # two proteins in one pack, two shards
    assert files_in(folder / "results") == {"index.h5"}

    again, rules = snakemake(folder, "plan")  # measured anew, not remembered
    assert rules == ["plan", "plan_shards", "plan_shards"]
    assert again.count("tokens/s") == 2
    assert files_in(folder / "results") == {"index.h5"}


def test_a_run_after_it_takes_the_index_and_does_what_was_planned(planned: tuple[Path, str, list[str]]) -> None:
    folder, printed, _ = planned
    index = folder / RESULTS.format("many") / "index.h5"
    before = index.stat().st_mtime_ns
    _, rules = snakemake(folder)
    assert (rules.count("build_index"), rules.count("embed_shard"), index.stat().st_mtime_ns) == (0, 4, before)
    manifest = json.loads((index.parent / "manifest.json").read_text())
    assert f"{manifest['counts']['num_tokens']:,} tokens\n" in printed
    tokens = [shard["run"]["num_tokens"] for shard in manifest["shards"]]
    assert f" packs and {min(tokens):,} to {max(tokens):,} tokens in each\n" in printed
    assert sum(tokens) == manifest["counts"]["num_tokens"]
