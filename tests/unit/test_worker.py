"""The worker as a program: status before exit, clear errors, nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import DEMO, SCRIPTS, Run, run_script
from seqpack.index_build import LengthPolicy
from seqpack.interrupts import Signals
from sequences import random_sequences


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("indexed"), 2).build(DEMO)


def embed(run: Run, *more: object, rank: int = 0, world_size: int = 2) -> subprocess.CompletedProcess[str]:
    return run_script(
        "embed_shard.py",
        *("--index", run.index, "--rank", rank, "--world-size", world_size),
        *("--output", run.folder / "s.h5", "--status", run.folder / "s.json", "--audit-seconds", 0, *more),
    )


def read_status(run: Run) -> dict:
    return json.loads((run.folder / "s.json").read_text())


def test_a_complete_shard_tells_all(indexed: Run) -> None:
    done = embed(indexed, "--attempt", 2, "--audit-seconds", 10)
    assert done.returncode == 0, done.stderr
    assert "UNTRAINED WEIGHTS" in done.stderr
    status = read_status(indexed)
    assert status["status"] == "complete"
    assert status["error"] is None
    assert status["attempt"] == 2
    assert status["shard_bytes"] == (indexed.folder / "s.h5").stat().st_size
    assert status["started"] <= status["ended"]
    assert {"import", "load", "resume", "compute", "audit", "write", "verify"} == status["seconds"].keys()
    assert status["num_packs"] == status["done_packs"] > status["resumed_packs"] == 0
    assert status["audit"]["verdict"] == "ok"
    assert status["audit"]["worst_cosine"] > 0.9999
    run = status["run"]
    assert run["num_tokens"] == run["num_residues"] + 2 * status["num_sequences"]
    assert 0 < run["pack_fill"] <= 1
    assert run["tokens_per_second"] > 0
    assert run["peak_host_bytes"] > 50e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cuda"), "sees no CUDA device"),
        (("--index", "nowhere.h5"), "nowhere.h5: no such index"),
        (("--index", str(DEMO)), "not a readable HDF5 index"),
    ],
)
def test_a_failed_worker_has_said_so_in_its_status(
    indexed: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, str], message: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (indexed.folder / "s.h5").unlink(missing_ok=True)
    done = embed(indexed, *arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert message in done.stderr
    status = read_status(indexed)
    assert status["status"] == "failed"
    assert status["error"]["type"] == "SeqpackError"
    assert message in status["error"]["message"]
    assert not (indexed.folder / "s.h5").exists()
    assert not list(indexed.folder.glob(".*"))


def test_a_rank_beyond_the_world_is_refused(indexed: Run) -> None:
    done = embed(indexed, rank=2)
    assert done.returncode == 1
    assert "rank must be 0 to world size - 1" in done.stderr
    assert read_status(indexed)["status"] == "failed"


def test_the_three_programs_alone(tmp_path: Path) -> None:
    """The command lines that are public interface, as they stand in the issue."""
    (tmp_path / "f.faa").write_text(">a\nMKV\n>b\nMKL\n")
    model = "untrained:esm2_t6_8M_UR50D"
    commands = [
        f"build_index.py --fasta f.faa --model {model} --output index.h5",
        f"embed_shard.py --index index.h5 --model {model} --rank 0 --world-size 1 --output s.h5 --status s.status.json",
        "merge_shards.py --index index.h5 --shards s.h5 --output embeddings.h5",
    ]
    for command in commands:
        done = run_script(*command.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "embeddings.h5").exists()


def test_another_model_than_the_indexs(indexed: Run) -> None:
    done = embed(indexed, "--model", "untrained:esm2_t12_35M_UR50D")
    assert done.returncode == 0, done.stderr
    assert read_status(indexed)["fingerprint"]["model"] == "untrained:esm2_t12_35M_UR50D"


def test_a_full_disk_stops_the_worker_with_one_line(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    run = Run(tmp_path, 1).build(DEMO)
    arguments = ("--index", run.index, "--rank", 0, "--world-size", 1)
    done = run_script(
        *("embed_shard.py", *arguments, "--output", run.shards[0], "--status", run.statuses[0]), preexec_fn=limit
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "rank_0-of-1_pack_00000000.part.h5" in done.stderr.splitlines()[-1]
    assert "make room and run again" in done.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.h5", "parts", "shard_0-of-1.status.json"]
    assert not list((tmp_path / "parts").iterdir())
    assert json.loads(run.statuses[0].read_text())["status"] == "failed"


def test_what_a_killed_worker_left_is_removed_by_the_next(indexed: Run, tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = tmp_path / f".s.h5.{socket.gethostname()}.{gone.pid}.tmp"
    elsewhere = tmp_path / f".s.h5.another-host.{gone.pid}.tmp"
    of_another = tmp_path / f".t.h5.another-host.{gone.pid}.tmp"
    for path in (left, elsewhere, of_another):
        path.write_bytes(b"half")
    arguments = ("--index", indexed.index, "--rank", 0, "--world-size", 2)
    done = run_script("embed_shard.py", *arguments, "--output", tmp_path / "s.h5", "--status", tmp_path / "s.json")
    assert done.returncode == 0, done.stderr
    assert not left.exists()
    assert not elsewhere.exists()  # the lock says that no one is at it, on no machine
    assert of_another.exists()


def test_a_damaged_index_is_noticed_by_the_packs_checksum(indexed: Run, tmp_path: Path) -> None:
    data = bytearray(indexed.index.read_bytes())
    position = data.find(bytes([0, 20, 14, 11]))  # cls M P T: the first tokens of a protein
    assert position > 0
    data[position + 2] ^= 1
    (tmp_path / "index.h5").write_bytes(data)
    statuses = []
    for rank in range(2):
        embed(Run(tmp_path, 2), rank=rank)
        statuses.append(read_status(Run(tmp_path, 2)))
    assert [status["status"] for status in statuses].count("failed") == 1
    assert any("are damaged; build the index again" in str(status["error"]) for status in statuses)


def test_weights_with_a_nan_are_named_not_written(tmp_path: Path) -> None:
    import torch

    from reference import fair_esm_model, save_checkpoint
    from seqpack.models.registry import MODELS

    model = fair_esm_model(MODELS["esm2_t6_8M_UR50D"])
    with torch.no_grad():
        model.embed_tokens.weight[23] = float("nan")  # C
    checkpoint = save_checkpoint(model, tmp_path / "nan.pt")
    fasta = tmp_path / "two.faa"
    fasta.write_text(">without\nMKVLAA\n>with\nMKCL\n")
    run = Run(tmp_path, 1).build(fasta, str(checkpoint))
    done = embed(run, rank=0, world_size=1)
    assert done.returncode == 1
    assert "1 sequence has no finite embedding, in float32 either: 'with' (record 2)" in done.stderr
    assert not (tmp_path / "s.h5").exists()


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGTERM], 143),
        ([signal.SIGINT], 130),
        ([signal.SIGHUP], 129),
        ([signal.SIGINT, signal.SIGTERM, signal.SIGTERM], None),
    ],
)
def test_signals_are_answered_with_a_status(tmp_path: Path, numbers: list[signal.Signals], code: int | None) -> None:
    fasta = tmp_path / "many.faa"
    fasta.write_text("".join(f">{n}\n{s}\n" for n, s in enumerate(random_sequences([1000] * 400))))
    run = Run(tmp_path, 1).build(fasta)
    status = tmp_path / "s.json"
    command = [sys.executable, str(SCRIPTS / "embed_shard.py"), "--index", str(run.index), "--rank", "0"]
    command += ["--world-size", "1", "--output", str(tmp_path / "s.h5"), "--status", str(status)]
    # A shell lets its background jobs ignore SIGINT, which the worker would obey.
    worker = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    )
    try:
        while not (status.exists() and json.loads(status.read_text())["fingerprint"]):
            assert worker.poll() is None
            time.sleep(0.05)
        for number in numbers:
            os.kill(worker.pid, number)
        assert worker.wait(timeout=60) == code or code is None
    finally:
        worker.kill()
    content = read_status(run)
    assert content["status"] == "failed"
    assert content["error"]["type"] == "Interrupted"
    assert content["error"]["message"] in {f"stopped by {number.name}" for number in numbers}
    assert not (tmp_path / "s.h5").exists()
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_signal_that_was_ignored_stays_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    signals = Signals()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals.catch()
        os.kill(os.getpid(), signal.SIGHUP)
        signals.restore()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signals.received == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_long_sequences_do_not_overfill_packs(tmp_path: Path) -> None:
    (tmp_path / "long.faa").write_text(f">long\n{'MKVL' * 1250}\n>short\nMKV\n")
    run = Run(tmp_path, 1).build(tmp_path / "long.faa", policy=LengthPolicy(max_length=5000)).embed("bfloat16")
    assert 0 < json.loads(run.statuses[0].read_text())["run"]["pack_fill"] <= 1
