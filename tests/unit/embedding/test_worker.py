"""The worker as a program: status before exit, clear errors, nothing half-written."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dnabert_reference import save_folder
from families import (
    CONTIGS,
    EACH,
    ESMC,
    ONE_EACH,
    PROSTT5,
    PROTEINS,
    PROTT5,
    SMALL,
    WINDOWS,
    Family,
    dnabert_state,
    write_fasta,
)
from pipeline import DEMO, MODEL, SCRIPTS, SUPPORT, Run, results_of, run_script, save_parts
from seqmill import open_embeddings
from seqmill.base.signals import Interrupted, Signals
from seqmill.embedding import rank
from seqmill.embedding.resume import DonePacks
from seqmill.embedding.worker import embed_shard
from seqmill.errors import SeqmillError
from seqmill.spec.fingerprint import Fingerprint
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.packing import rows_of_rank
from seqmill.spec.task import ComputeSettings, ShardTask
from seqmill.store.index import open_index
from seqmill.store.part_file import PackResult
from seqmill.store.parts import PartStore
from sequences import random_sequences

DIE_AT = Path(__file__).parents[2] / "faults/die_at.py"


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("indexed")
    return Run(folder, 2).build(
        write_fasta(folder / "some.faa", random_sequences([*range(20, 320, 10)])), PROTEINS.model
    )


def embed(run: Run, *more: object, rank: int = 0, world_size: int = 2) -> subprocess.CompletedProcess[str]:
    return run_script(
        "embed_shard.py",
        *("--index", run.index, "--rank", rank, "--world-size", world_size),
        *("--output", run.folder / "s.h5", "--status", run.folder / "s.json", "--audit-seconds", 0, *more),
    )


def read_status(run: Run) -> dict:
    return json.loads((run.folder / "s.json").read_text())


@pytest.mark.parametrize("family", ONE_EACH, ids=str)
def test_the_status_of_a_complete_shard(family: Family, tmp_path: Path) -> None:
    model = MODEL if family is PROTEINS else family.model  # the first is untrained, and must say so
    run = Run(tmp_path, 2).build(family.write_odd(tmp_path), model, family.policy)
    done = embed(run, "--attempt", 2, "--audit-seconds", 10)
    assert done.returncode == 0, done.stderr
    status, index = read_status(run), open_index(run.index)
    assert ("UNTRAINED WEIGHTS" in done.stderr) == bool(status["warning"]) == (family is PROTEINS)
    assert status["status"] == "complete"
    assert status["error"] is None
    assert status["attempt"] == 2
    assert status["shard_bytes"] == (tmp_path / "s.h5").stat().st_size
    assert status["started"] <= status["ended"]
    assert {"import", "load", "resume", "compute", "audit", "write", "verify"} == status["seconds"].keys()
    assert status["num_packs"] == status["done_packs"] > status["resumed_packs"] == 0
    assert status["audit"]["verdict"] == "ok"
    assert status["audit"]["worst_cosine"] > 0.9999
    said, rows = status["run"], rows_of_rank(index.pack_offsets, 0, 2)
    assert status["num_sequences"] == len(rows)
    assert said["num_tokens"] == sum(len(segment) for row in rows for segment in index.row_segments(row))
    kept = [min(len(family.sequences[record]), family.longest) for record in index.sequence_records[rows]]
    assert said["num_residues"] == sum(kept)
    assert 0 < said["pack_fill"] <= 1
    assert said["tokens_per_second"] > 0
    assert said["peak_host_bytes"] > 50e6


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", EACH, ids=str)
def test_every_shard_with_work_is_audited(family: Family, precision: str, tmp_path: Path) -> None:
    run = Run(tmp_path, 3).build(family.write_odd(tmp_path), family.model, family.policy)
    run.embed(precision, audit_seconds=3600).merge()
    for status in (json.loads(path.read_text()) for path in run.statuses):
        audit = status["audit"]
        if not status["num_sequences"]:
            assert audit["verdict"] == "none"
            continue
        assert audit["verdict"] == "ok", audit
        assert audit["worst_cosine"] > (0.999999 if precision == "float32" else 0.999)
        assert audit["sequences"] >= 1  # more as time allows
        assert audit["reference"].startswith(family.reference)
    found = open_embeddings(run.embeddings).attrs
    assert found["audit_reference"].startswith(family.reference)
    assert found["audit_sequences"] == sum(a["audit"]["sequences"] for a in run.manifest["shards"])


def each_of_the_one_before(run: Run, results: list[PackResult]) -> list[PackResult]:
    return [replace(result, embeddings=np.roll(result.embeddings, 1, axis=0)) for result in results]


def longest_by_one_strand(run: Run, results: list[PackResult]) -> list[PackResult]:
    """Replace the longest contig's embedding with that of its forward strand alone, which is 4 % off."""
    policy = replace(WINDOWS.policy, strand="forward")
    forward = Run(run.folder / "forward", 1).build(WINDOWS.write_odd(run.folder), WINDOWS.model, policy)
    first, *others = results
    embeddings = first.embeddings.copy()
    embeddings[0] = results_of(forward.embed())[0].embeddings[0]
    return [replace(first, embeddings=embeddings), *others]


@pytest.mark.parametrize(
    ("family", "tamper"),
    [
        pytest.param(PROTEINS, each_of_the_one_before, id="proteins"),
        pytest.param(CONTIGS, each_of_the_one_before, id="contigs"),
        pytest.param(WINDOWS, each_of_the_one_before, id="windows"),
        pytest.param(ESMC, each_of_the_one_before, id="esmc"),
        pytest.param(PROTT5, each_of_the_one_before, id="prott5"),
        pytest.param(PROSTT5, each_of_the_one_before, id="prostt5"),
        pytest.param(WINDOWS, longest_by_one_strand, id="one strand of two"),
    ],
)
def test_wrong_embeddings_are_caught_by_the_audit_and_not_merged(
    family: Family, tamper: Callable[[Run, list[PackResult]], list[PackResult]], tmp_path: Path
) -> None:
    """They come from intact part files, as if a kernel had computed wrong values before they were saved."""
    run = Run(tmp_path, 1).build(family.write_odd(tmp_path), family.model, family.policy).embed()
    fingerprint = Fingerprint.from_attributes(json.loads(run.statuses[0].read_text())["fingerprint"])
    save_parts(tmp_path / "parts", open_index(run.index), fingerprint, tamper(run, results_of(run)), "shard_0-of-1.h5")
    run.shards[0].unlink()
    run.embed(audit_seconds=3600)
    status = json.loads(run.statuses[0].read_text())
    assert status["resumed_packs"] == status["num_packs"]
    assert status["audit"]["verdict"] == "fail"
    with pytest.raises(SeqmillError, match=r"its audit failed, the embeddings are wrong"):
        run.merge()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cuda"), "sees no CUDA device"),
        (("--device", "cpu", "--precision", "float8"), "float8 can't be used: it needs a CUDA device of compute"),
        (("--index", "nowhere.h5"), "nowhere.h5: no such index"),
        (("--index", str(DEMO)), "not a readable HDF5 index"),
    ],
)
def test_a_failed_worker_says_so_in_its_status(
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
    assert status["error"]["type"] == "SeqmillError"
    assert message in status["error"]["message"]
    assert not (indexed.folder / "s.h5").exists()
    assert not list(indexed.folder.glob(".*"))


def test_a_rank_beyond_the_world_size_is_refused(indexed: Run) -> None:
    done = embed(indexed, rank=2)
    assert done.returncode == 1
    assert "rank must be 0 to world size - 1" in done.stderr
    assert read_status(indexed)["status"] == "failed"


def test_the_three_programs_without_a_workflow(tmp_path: Path) -> None:
    """The command lines that are the public interface."""
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


@pytest.mark.parametrize("family", ONE_EACH, ids=str)
def test_an_index_of_another_family(family: Family, tmp_path: Path) -> None:
    other = ONE_EACH[ONE_EACH.index(family) - 1]
    run = Run(tmp_path, 1).build(family.write_odd(tmp_path), family.model, family.policy)
    with pytest.raises(SeqmillError, match=r"index\.h5: made for .*, and .* is one of") as error:
        run.embed(model=other.model)
    assert f"and {other.model} is one of " in str(error.value)
    assert str(error.value).endswith("; build the index again for this model")
    assert json.loads(run.statuses[0].read_text())["error"]["message"] == str(error.value)


def test_an_index_made_with_another_tokenizer(tmp_path: Path) -> None:
    """Same family but different tokens: a worker would compute nonsense, or fail on an id that the model lacks."""
    run = Run(tmp_path, 1).build(WINDOWS.write_odd(tmp_path), WINDOWS.model, WINDOWS.policy)
    folder = save_folder(dnabert_state(SMALL), SMALL, tmp_path / "other")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SeqmillError, match=r"index\.h5: .*tokenizer.*build the index again for this model"):
        run.embed(model=str(folder))


def test_another_model_than_that_of_the_index(indexed: Run) -> None:
    done = embed(indexed, "--model", MODEL)
    assert done.returncode == 0, done.stderr
    assert read_status(indexed)["fingerprint"]["model"] == MODEL


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
    assert re.search(r"shard_0-of-1\.h5_pack_00000000-\d{8}-by-1\.part\.h5", done.stderr.splitlines()[-1])
    assert "make room and run again" in done.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.h5", "parts", "shard_0-of-1.status.json"]
    assert not list((tmp_path / "parts").iterdir())
    assert json.loads(run.statuses[0].read_text())["status"] == "failed"


def test_temporary_files_of_a_killed_worker_are_removed_by_the_next(indexed: Run, tmp_path: Path) -> None:
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
    assert not elsewhere.exists()  # the lock is free, so no worker on any machine is writing
    assert of_another.exists()


def test_a_status_never_replaces_another_file(indexed: Run, tmp_path: Path) -> None:
    """Nor the shard: the status is the first file that a worker writes."""
    index = tmp_path / "index.h5"
    shutil.copy(indexed.index, index)
    (tmp_path / "link.h5").symlink_to(index)
    before = index.read_bytes()
    for status, shard, said in (
        (index, tmp_path / "s.h5", "is the input as well as the output"),
        (tmp_path / "link.h5", tmp_path / "s.h5", "is the input as well as the output"),
        (tmp_path / "s.h5", tmp_path / "s.h5", "is named for two outputs"),
    ):
        arguments = ("--index", index, "--rank", 0, "--world-size", 1, "--output", shard, "--status", status)
        done = run_script("embed_shard.py", *arguments)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert said in done.stderr
    assert index.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.h5", "link.h5"]


def test_a_shard_never_replaces_an_input(indexed: Run, tmp_path: Path) -> None:
    """And the status says why there is no shard."""
    index, weights = tmp_path / "index.h5", tmp_path / "model.pt"
    shutil.copy(indexed.index, index)
    weights.write_bytes(b"weights")
    for shard, model in ((index, ()), (weights, ("--model", weights))):
        before = shard.read_bytes()
        arguments = ("--index", index, "--rank", 0, "--world-size", 1, "--output", shard, "--status", tmp_path / "s")
        done = run_script("embed_shard.py", *arguments, *model)
        assert done.returncode == 1
        said = json.loads((tmp_path / "s").read_text())
        assert said["status"] == "failed"
        assert said["error"]["message"].endswith("is the input as well as the output; nothing was written")
        assert shard.read_bytes() == before


def test_a_folder_whose_name_is_not_utf8(indexed: Run, tmp_path: Path) -> None:
    """Its status and manifest name it with the byte escaped, and every program reads the results."""
    folder = tmp_path / os.fsdecode(b"r\xff")
    folder.mkdir()
    run = Run(folder, 1)
    shutil.copy(indexed.index, run.index)
    arguments = ("--index", run.index, "--rank", 0, "--world-size", 1, "--output", run.shards[0])
    for program, more in (
        ("embed_shard.py", (*arguments, "--status", run.statuses[0])),
        ("merge_shards.py", ("--index", run.index, "--shards", run.shards[0], "--output", run.embeddings)),
        ("report.py", ("--embeddings", run.embeddings, "--output", folder / "report.html")),
        ("search.py", ("--query", run.embeddings, "--target", run.embeddings, "--output", folder / "near.tsv")),
        ("export.py", ("--embeddings", run.embeddings, "--format", "npy", "--output", folder / "e.npy")),
        ("doctor.py", (folder,)),
    ):
        done = run_script(program, *more)
        assert done.returncode == 0, done.stderr
    escaped = f"{tmp_path}/r\\udcff/shard_0-of-1.h5"
    assert json.loads(run.statuses[0].read_text("utf-8"))["shard_path"] == escaped
    assert run.manifest["shards"][0]["path"] == escaped
    assert len(open_embeddings(run.embeddings)) == open_index(run.index).num_records


def test_a_failure_in_a_folder_whose_name_is_not_utf8_has_a_status(tmp_path: Path) -> None:
    status = tmp_path / "s.json"
    missing = tmp_path / os.fsdecode(b"r\xff") / "index.h5"
    arguments = ("--index", missing, "--rank", 0, "--world-size", 1, "--output", tmp_path / "s.h5", "--status", status)
    assert run_script("embed_shard.py", *arguments).returncode == 1
    assert "r\\udcff/index.h5: no such index" in json.loads(status.read_text("utf-8"))["error"]["message"]


@pytest.mark.parametrize("family", ONE_EACH, ids=str)
def test_a_damaged_index_is_noticed_by_the_packs_checksum(family: Family, tmp_path: Path) -> None:
    run = Run(tmp_path, 2).build(family.write_odd(tmp_path), family.model, family.policy)
    data = bytearray(run.index.read_bytes())
    position = data.find(open_index(run.index).tokens[:20].tobytes())
    assert position > 0
    data[position + 7] ^= 1
    run.index.write_bytes(data)
    with pytest.raises(SeqmillError, match=r"the tokens of pack 0 are damaged; build the index again"):
        embed_shard(run.task(0))
    embed_shard(run.task(1))
    statuses = [json.loads(path.read_text()) for path in run.statuses]
    assert [status["status"] for status in statuses] == ["failed", "complete"]
    assert "are damaged; build the index again" in statuses[0]["error"]["message"]


def test_sequences_that_become_nan_are_named_and_not_written(tmp_path: Path) -> None:
    import torch

    from reference import fair_esm_model, save_checkpoint
    from seqmill.spec.models import MODELS

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
def test_signals_are_named_in_the_status(tmp_path: Path, numbers: list[signal.Signals], code: int | None) -> None:
    fasta = tmp_path / "many.faa"
    fasta.write_text("".join(f">{n}\n{s}\n" for n, s in enumerate(random_sequences([1000] * 400))))
    run = Run(tmp_path, 1).build(fasta)
    status = tmp_path / "s.json"
    command = [sys.executable, str(SCRIPTS / "embed_shard.py"), "--index", str(run.index), "--rank", "0"]
    command += ["--world-size", "1", "--output", str(tmp_path / "s.h5"), "--status", str(status)]

    def heed_all() -> None:
        """Undo ignored signals, which the tests may inherit: SIGINT in a shell's background, SIGHUP under nohup."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)

    worker = subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=heed_all)
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


@pytest.mark.parametrize("family", [PROTEINS, WINDOWS], ids=str)
def test_a_killed_worker_is_resumed_with_another_world_size(family: Family, tmp_path: Path) -> None:
    """SIGKILL with two parts saved and a third half-written; tests/faults covers other moments and families."""
    run = Run(tmp_path / "killed", 1).build(family.write_odd(tmp_path), family.model, family.policy)
    shutil.copytree(run.folder, tmp_path / "alone")
    arguments = ("--index", run.index, "--rank", 0, "--world-size", 1, "--output", run.shards[0], "--save-seconds", 0)
    settings = ("--status", run.statuses[0], "--device", "cpu", "--precision", "float32")
    died = subprocess.run(
        [sys.executable, str(DIE_AT), "amid the third part's data", *map(str, (*arguments, *settings))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(SUPPORT), str(SCRIPTS)))},
        capture_output=True,
        text=True,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert len(list((run.folder / "parts").glob("*.part.h5"))) == 2
    resumed = Run(run.folder, 3).embed().merge()
    assert sum(json.loads(status.read_text())["resumed_packs"] for status in resumed.statuses) == 2
    alone = Run(tmp_path / "alone", 1).embed().merge()
    assert (open_embeddings(resumed.embeddings)[:] == open_embeddings(alone.embeddings)[:]).all()


def test_a_stopped_worker_does_not_ask_for_a_larger_disk(indexed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the exception of the signal was lost in a callback of HDF5."""

    def lose_the_signal(store: PartStore, packs: range, with_quarantined: bool) -> DonePacks:
        with suppress(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        return DonePacks(store.index)

    def refuse(*_: object) -> None:
        raise AssertionError("the disk was looked at")

    monkeypatch.setattr(rank, "find_parts", lose_the_signal)
    monkeypatch.setattr(rank, "require_space", refuse)
    settings = ComputeSettings(device="cpu", precision="float32")
    task = ShardTask(indexed.index, 0, 2, indexed.folder / "stop.h5", indexed.folder / "stop.json", settings=settings)
    with pytest.raises(Interrupted):
        embed_shard(task)


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
