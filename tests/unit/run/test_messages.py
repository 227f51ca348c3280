"""What is said at the end of a run that has failed: real logs and statuses, and whatever else may lie there."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from seqmill.base.locks import locked_shard
from seqmill.run.messages import failure_message
from seqmill.store.status import RUNNING, ShardStatus

NAMES = ["a/m", "b/m", "c/m", "fetch_weights"]
START = 1_700_000_000.0


def write(path: Path, text: str, seconds: float) -> Path:
    """Write a file as if so many seconds after the start of the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (START + seconds, START + seconds))
    return path


def lines(root: Path, names: list[str] | None = None) -> list[str]:
    return failure_message(root, names or NAMES, START).splitlines()


def test_a_line_for_each_that_failed(tmp_path: Path) -> None:
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
    scripts = Path(__file__).resolve().parents[3] / "scripts"
    assert said[-1] == f"See more: python {scripts / 'doctor.py'} {tmp_path / 'results'}"


def test_what_failed_before_this_run_is_not_told(tmp_path: Path) -> None:
    write(tmp_path / "logs/a/m/embed_shard_0-of-7.log", "10:00:01 ERROR no\n", -1000)
    write(tmp_path / "logs/d/m/build_index.log", "10:00:01 ERROR of another table\n", 5)
    assert lines(tmp_path) == []


def test_a_worker_that_was_killed(tmp_path: Path) -> None:
    shard = tmp_path / "results/a/m/shards/shard_1-of-2.h5"
    status = ShardStatus(1, 2, RUNNING, str(shard))
    write(shard.with_suffix(".status.json"), msgspec.json.encode(status).decode(), 5)
    write(tmp_path / "logs/a/m/embed_shard_1-of-2.log", "10:00:00 INFO loading\n", 5)
    assert lines(tmp_path)[1:-1] == ["  a/m: shard_1-of-2: its worker is gone without a word (killed?)"]
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
    assert failure_message(tmp_path / "nowhere", NAMES, START) == ""
