"""The messages at the end of a run, from manifests, logs and statuses in any state."""

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
import yaml

from pipeline import REPOSITORY
from seqmill.base.commands import command
from seqmill.base.locks import locked_shard
from seqmill.run.dataset_run import DatasetRun
from seqmill.run.datasets import Dataset
from seqmill.run.settings import check_settings
from seqmill.run.summary import Stamp, failure_message, results_message, stamps_of
from seqmill.spec.models import find_model
from seqmill.store.status import RUNNING, ShardStatus

NAMES = ["a/m", "b/m", "c/m", "fetch_weights"]
START = 1_700_000_000.0
EMPTY: Mapping[Path, Stamp] = {}


def run_of(name: str, fasta: Path, model: str, **settings: object) -> DatasetRun:
    schema = yaml.safe_load((REPOSITORY / "config/schemas/config.schema.yaml").read_text())
    return DatasetRun.of(Dataset(name, fasta, find_model(model)), check_settings(settings, schema, []))


def running(rank: int) -> str:
    """Return the status JSON of a worker that is computing a shard of two."""
    return msgspec.json.encode(ShardStatus(rank, 2, RUNNING, f"shard_{rank}-of-2.h5")).decode()


def write(path: Path, text: str, seconds: float) -> Path:
    """Write a file with a time this many seconds after the start of the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (START + seconds, START + seconds))
    return path


def lines(root: Path, names: list[str] | None = None, before: Mapping[Path, Stamp] = EMPTY) -> list[str]:
    return failure_message(root / "results", root / "logs", names or NAMES, before).splitlines()


def test_a_line_for_each_failure(tmp_path: Path) -> None:
    write(tmp_path / "logs/a/m/build_index.log", "10:00:00 INFO x\n10:00:01 ERROR a.faa: record 2: '-'\x1b[2J\n", 5)
    write(tmp_path / "logs/b/m/build_index.log", "10:00:00 INFO all is well\n", 5)
    write(tmp_path / "logs/fetch_weights/w.log", "10:00:01 ERROR w.pt: no such host\n", 5)
    for rank in range(3):
        write(tmp_path / f"logs/c/m/embed_shard_{rank}-of-3.log", f"10:00:01 ERROR {rank} is full\n", 7 - rank)
    said = lines(tmp_path)
    assert said[1:-1] == [
        "  a/m: a.faa: record 2: '-'\\x1b[2J",
        "  c/m: 0 is full (and 2 more logs with errors)",
        "  fetch_weights: w.pt: no such host",
    ]
    assert said[-1] == f"See more: {command('doctor', str(tmp_path / 'results'))}"


def test_failures_before_this_run_are_not_reported(tmp_path: Path) -> None:
    """No clock decides: that of a node may be an hour off."""
    old = write(tmp_path / "logs/a/m/embed_shard_0-of-7.log", "10:00:01 ERROR no\n", 3600)
    write(tmp_path / "logs/b/m/merge_shards.log", "10:00:01 ERROR no\n", 0)
    killed = write(tmp_path / "results/a/m/shards/shard_1-of-2.status.json", running(1), 0)
    before = stamps_of(tmp_path / "results", tmp_path / "logs", NAMES)
    write(tmp_path / "logs/d/m/build_index.log", "10:00:01 ERROR of another table\n", 5)
    assert lines(tmp_path, before=before) == []
    write(tmp_path / "logs/c/m/build_index.log", "10:00:01 ERROR new\n", -3600)
    assert lines(tmp_path, before=before)[1:-1] == ["  c/m: new"]
    write(old, "10:00:01 ERROR no\n", 3601)  # the same error again
    assert lines(tmp_path, before=before)[1:-1] == ["  a/m: no", "  c/m: new"]
    write(old, "10:00:01 INFO it works now\n", 3602)
    killed.write_text(killed.read_text() + " ")
    message = "  a/m: shard_1-of-2: its worker has ended without a message (killed?)"
    assert lines(tmp_path, before=before)[1:-1] == [message, "  c/m: new"]


def test_a_status_that_is_replaced_within_one_tick_of_the_clock_is_new(tmp_path: Path) -> None:
    status = write(tmp_path / "results/a/m/shards/shard_1-of-2.status.json", running(1), 0)
    before = stamps_of(tmp_path / "results", tmp_path / "logs", NAMES)
    write(status.with_name("new"), running(1), 0).replace(status)
    assert len(lines(tmp_path, before=before)) == 3


def test_a_worker_that_was_killed(tmp_path: Path) -> None:
    shard = tmp_path / "results/a/m/shards/shard_1-of-2.h5"
    write(shard.with_suffix(".status.json"), running(1), 5)
    write(tmp_path / "logs/a/m/embed_shard_1-of-2.log", "10:00:00 INFO loading\n", 5)
    assert lines(tmp_path)[1:-1] == ["  a/m: shard_1-of-2: its worker has ended without a message (killed?)"]
    with locked_shard(shard):
        assert lines(tmp_path) == []


def test_it_never_fails(tmp_path: Path) -> None:
    (tmp_path / "logs/a/m/x.log").mkdir(parents=True)
    (tmp_path / "logs/b").mkdir()
    (tmp_path / "logs/b/m").write_text("a file")
    (tmp_path / "logs/a/m/y.log").symlink_to("nowhere")
    write(tmp_path / "logs/c/m/z.log", "10:00:01 ERROR told\n", 5).with_name("\udcff.log").write_bytes(b"\xff ERROR")
    write(tmp_path / "results/a/m/shards/shard_0-of-2.status.json", "[" * 100_000, 5)
    write(tmp_path / "results/a/m/shards/shard_1-of-2.status.json", "{", 5)
    (tmp_path / "results/b/m/shards").mkdir(parents=True)
    assert lines(tmp_path, ["a/m", "b/m", "c/m", "\0/m", ""])[1:-1] == ["  c/m: told"]
    assert stamps_of(tmp_path / "results", tmp_path / "logs", ["a/m", "b/m", "c/m", "\0/m", ""]).keys() > {
        tmp_path / "logs/c/m/z.log"
    }
    assert failure_message(tmp_path / "nowhere", tmp_path / "nowhere", NAMES, {}) == ""
    assert stamps_of(tmp_path / "nowhere", tmp_path / "nowhere", NAMES) == {}


def test_results_are_named_with_warnings_for_their_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models = ("esm2_t6_8M_UR50D", "untrained:esm2_t6_8M_UR50D", "untrained:dnabert_s", "untrained:prostt5", "dnabert_s")
    datasets = [run_of(f"d{n}", Path("a b.fa"), model) for n, model in enumerate(models)]
    (tmp_path / "Snakefile").touch()
    assert results_message(datasets, False) == ""
    for dataset, number in zip(datasets[:4], (3, 0, None, 0), strict=True):
        write(dataset.folder.embeddings, "", 5)
        content = (
            {"counts": {"fates": {"embedded": 5, "truncated": number, "quarantined": number}}}
            if number is not None
            else {"counts": []}
        )
        write(dataset.folder.manifest, json.dumps(content), 5)
    said = results_message(datasets, False)
    first = "results/d0/esm2_t6_8M_UR50D"
    assert said.startswith(f"\nd0: {first}/embeddings.h5\n")
    assert said.count("at a glance: ") == 4
    told = [line.partition("records: ")[2].strip() for line in said.splitlines() if line.startswith("    records: ")]
    assert told == [
        "5 embedded, 3 truncated, 3 quarantined; the settings max_length and long_sequences change that",
        "5 embedded",
        "unknown",
        "5 embedded",
    ]
    assert f"import seqmill; e = seqmill.open_embeddings('{first}/embeddings.h5')\n    e.ids" in said
    assert "d4" not in said
    assert said.count("QUARANTINED") == 1
    assert "QUARANTINED: 3 records of d0 have no finite embedding" in said
    assert said.count("UNTRAINED WEIGHTS") == 3
    commands = [line.partition("e.g. ")[2] for line in said.splitlines() if "e.g. " in line]
    assert [shlex.split(line)[-2:] for line in commands] == [
        ["fasta=a b.fa", "model=esm2_t33_650M_UR50D"],
        ["fasta=a b.fa", "model=dnabert_s"],
        ["fasta=a b.fa", "model=prostt5"],
    ]

    (tmp_path / "Snakefile").unlink()
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # without seqmill
    said = results_message(datasets[1:], False)
    assert f"e.g. {command('run', 'a b.fa', '--model', 'esm2_t33_650M_UR50D')}\n" in said


def test_exports_that_exist_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"exports": ["npy", "pt"], "pooling": ["mean", "max"]}
    dataset = run_of("d", Path("p.faa"), "untrained:esm2_t6_8M_UR50D", **settings)
    write(dataset.folder.embeddings, "", 5)
    assert "exports" not in results_message([dataset], False)
    for path in dataset.exports[:3]:
        write(path, "", 5)
    exports = "results/d/untrained-esm2_t6_8M_UR50D/exports"
    first, *others = [line for line in results_message([dataset], False).splitlines() if "/exports/" in line]
    assert first == f"    exports:                 {exports}/embeddings.npy"
    assert [line.strip() for line in others] == [f"{exports}/embeddings_6_max.npy", f"{exports}/embeddings_pt"]
    assert all(line.index(exports) == first.index(exports) for line in others)
    assert f"    exports:                 {tmp_path}/{exports}/embeddings.npy\n" in results_message([dataset], True)


def test_invalid_records_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = run_of("d", Path("p.faa"), "esm2_t6_8M_UR50D")
    write(dataset.folder.embeddings, "", 5)
    fates = {"embedded": 5, "rejected": 3, "quarantined": 0}
    write(dataset.folder.manifest, json.dumps({"counts": {"num_invalid": 2, "fates": fates}}), 5)
    said = results_message([dataset], False)
    assert "records:                 5 embedded, 3 rejected\n" in said
    assert said.endswith(
        "\nINVALID: 2 records of d left out, with a letter that is not allowed or without a sequence; "
        "results/d/esm2_t6_8M_UR50D/records.tsv.gz names them"
    )


def test_results_in_another_folder_are_named_by_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "an output"
    folder.mkdir()
    monkeypatch.chdir(folder)
    dataset = run_of("d", Path("p.faa"), "untrained:dnabert_s")
    write(dataset.folder.embeddings, "", 5)
    write(dataset.folder.manifest, json.dumps({"counts": {"fates": {"quarantined": 2}}}), 5)
    said = results_message([dataset], True)
    results = folder / "results/d/untrained-dnabert_s"
    assert said.startswith(f"\nd: {results}/embeddings.h5\n")
    assert f"seqmill.open_embeddings('{results}/embeddings.h5')" in said
    assert f"left out; {results}/records.tsv.gz names them" in said
    assert f"e.g. {command('run', f'{folder}/p.faa', '--model', 'dnabert_s', '--output', str(folder))}" in said
