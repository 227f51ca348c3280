"""Signals that ask a worker to stop, and a second worker on the same shard."""

import random
import re
import signal
import socket
import time
from pathlib import Path
from subprocess import Popen

from workers import EACH_PACK, Undisturbed, digest_of, embed, finish, left_behind, parts_in, start, status_of

from pipeline import Run
from seqmill.base.locks import lock_path_of
from sequences import random_sequences

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ENDS_WITHIN = 60.0  # seconds; the stop takes no longer than to compute and save a pack
SAYS_EVERY_PACK = "import seqmill.embedding.compute; seqmill.embedding.compute.PROGRESS_SECONDS = 0"


def heed_interrupts() -> None:
    """A shell starts background processes with SIGINT ignored, and a worker would keep ignoring it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_a_status(run: Run, worker: Popen[str], fingerprint: bool = True) -> None:
    """Wait until this worker, not an earlier one, has written its first status, or the one with a fingerprint."""
    while True:
        assert worker.poll() is None
        if run.statuses[0].exists():
            status = status_of(run)
            if status["status"] == "running" and (status["fingerprint"] or not fingerprint):
                return
        time.sleep(0.02)


def test_stopped_again_and_again(tmp_path: Path) -> None:
    """On SIGTERM, SIGINT and SIGUSR1 a worker saves its finished packs, and the status says what happened.

    Six workers compute one shard in turn. Two are stopped at random moments during the imports, two at random moments
    while they save, and two when they have finished a pack but not saved it. Each resumes from the last pack that the
    worker before it counted.
    """
    generator = random.Random(5)
    lengths = [generator.randrange(20, 240) for _ in range(500)]
    (tmp_path / "many.faa").write_text("".join(f">id{n}\n{s}\n" for n, s in enumerate(random_sequences(lengths))))
    run = Run(tmp_path, 1).build(tmp_path / "many.faa")
    done_packs = 0
    for case, number in enumerate(STOPS * 2):
        early, unsaved = case in (1, 3), case in (2, 4)
        before = len(parts_in(run))
        seconds = 3600 if unsaved else 0.5
        worker = start(run, 0, "--save-seconds", seconds, before=SAYS_EVERY_PACK, preexec_fn=heed_interrupts)
        try:
            wait_for_a_status(run, worker, fingerprint=not early)
            while not early and (
                status_of(run)["done_packs"] <= done_packs if unsaved else len(parts_in(run)) == before
            ):
                assert worker.poll() is None
                time.sleep(0.01)
            time.sleep(generator.uniform(0, 0.3))
            before = len(parts_in(run))
            worker.send_signal(number)
            _, output = worker.communicate(timeout=ENDS_WITHIN)
        finally:
            worker.kill()
        assert worker.returncode == 128 + number, output
        assert "Traceback" not in output
        assert output.splitlines()[-1].endswith(f"stopped by {number.name}; finished packs are saved")
        status = status_of(run)
        assert status["status"] == "failed"
        assert status["error"] == {"type": "Interrupted", "message": f"stopped by {number.name}"}
        assert status["ended"]
        assert not run.shards[0].exists()
        assert [name for name in left_behind(run.folder) if name.endswith((".tmp", ".lock"))] == []
        if early and not status["resumed_packs"]:  # stopped before it looked for finished packs
            assert status["done_packs"] == 0
        else:
            assert status["resumed_packs"] == done_packs
            assert early or status["done_packs"] > done_packs
            done_packs = status["done_packs"]
        new_parts = len(parts_in(run)) - before
        print(f"{number.name}: {done_packs} packs in {len(parts_in(run))} parts, {new_parts} after the signal")
        assert new_parts or not unsaved
    digest, packs = finish(run)
    assert packs == done_packs
    assert left_behind(run.folder) == []
    (tmp_path / "alone").mkdir()
    assert digest == finish(Run(tmp_path / "alone", 1).build(tmp_path / "many.faa"))[0]


def hold_amid(run: Run, worker: Popen[str]) -> None:
    """Suspend the worker once it has saved two packs."""
    wait_for_a_status(run, worker)
    while len(parts_in(run)) < 2:
        assert worker.poll() is None
        time.sleep(0.02)
    worker.send_signal(signal.SIGSTOP)


def test_a_second_worker_leaves_the_first_alone(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """It says who computes the shard and exits with 1; the first worker's status and shard are unaffected."""
    run = undisturbed.again(tmp_path / "run", 1)
    first = start(run, 0, *EACH_PACK)
    try:
        hold_amid(run, first)  # or it would finish before the second gives up waiting
        before = run.statuses[0].read_bytes()
        second = embed(run, 0)
        assert second.returncode == 1
        assert "Traceback" not in second.stderr
        last = second.stderr.splitlines()[-1]
        assert "another worker is computing this shard" in last
        assert re.search(rf"process {first.pid} on {re.escape(socket.gethostname())}\b", last)
        assert run.statuses[0].read_bytes() == before
        first.send_signal(signal.SIGCONT)
        _, output = first.communicate(timeout=300)
    finally:
        first.kill()
    assert first.returncode == 0, output
    assert status_of(run)["status"] == "complete"
    assert status_of(run)["resumed_packs"] == 0
    assert digest_of(run.merge().embeddings) == undisturbed.digest
    assert left_behind(run.folder) == []


def test_a_merge_leaves_a_running_worker_alone(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Shards of another world size are finished and merged while a worker runs: its lock and its parts stay."""
    run = undisturbed.again(tmp_path / "run", 1)
    worker = start(run, 0, *EACH_PACK)
    try:
        hold_amid(run, worker)
        digest, packs = finish(undisturbed.again(run.folder, 2))
        assert digest == undisturbed.digest
        assert packs >= 2
        assert lock_path_of(run.shards[0]).exists()
        assert len(parts_in(run)) >= 2
        worker.send_signal(signal.SIGCONT)
        _, output = worker.communicate(timeout=300)
    finally:
        worker.kill()
    assert worker.returncode == 0, output
    assert digest_of(run.merge().embeddings) == undisturbed.digest
    assert left_behind(run.folder) == []
