"""Progress: real shards, statuses and locks as workers leave them, and unrelated files."""

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from pipeline import SCRIPTS, Run, run_script
from seqmill.base.locks import lock_path_of, locked_shard
from seqmill.base.words import in_one_line, time_in_words
from seqmill.embedding.worker import embed_shard
from seqmill.errors import SeqmillError
from seqmill.run.progress import Amount, Progress, progress_of
from seqmill.run.shard_state import OLD_SECONDS
from seqmill.run.slurm_jobs import claim_folder
from seqmill.run.watch import STILL_ALIVE, cells, console_of, print_progress, table, total_of
from seqmill.spec.outputs import Outputs
from seqmill.store.index import open_index
from seqmill.store.status import COMPLETE, FAILED, RUNNING, ShardStatus, StatusError, read_status
from sequences import random_sequences

NAME = "tiny/untrained-esm2_t6_8M_UR50D"
PACKS, TOKENS = 5, 3512  # of 12 proteins, 3,488 residues; a pack holds at most 1,024 tokens


class Results(Run):
    """The workflow's layout: results in ROOT/results/tiny/MODEL, shards in their own subfolder."""

    @property
    def results(self) -> Path:
        return self.folder.parents[1]

    @property
    def shards(self) -> list[Path]:
        return [self.folder / f"shards/shard_{rank}-of-{self.world_size}.h5" for rank in range(self.world_size)]

    def progress(self) -> Progress:
        (run,) = progress_of(self.results)
        assert run.name == NAME
        return run

    def set_status(self, rank: int, **changes: object) -> ShardStatus:
        """Write the status of a working worker, without `write_status`, which sets the time."""
        status = replace(read_status(self.statuses[rank]), **changes)
        self.statuses[rank].write_bytes(msgspec.json.encode(status))
        return status

    def run(self, rank: int, **changes: object) -> ShardStatus:
        """Make a rank's status say that it is running, updated just now."""
        self.shards[rank].unlink(missing_ok=True)
        return self.set_status(rank, **{"status": RUNNING, "ended": "", "updated": ago(0), **changes})


def lines_of(runs: list[Progress]) -> list[str]:
    """Return the table as it is printed without a terminal."""
    out = io.StringIO()
    console_of(out).print(table(runs))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def ago(seconds: float) -> str:
    return (datetime.now().astimezone() - timedelta(seconds=seconds)).isoformat(timespec="seconds")


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fasta") / "tiny.faa"
    sequences = random_sequences([700, 600, 500, 400, 300, 300, 200, 200, 100, 100, 80, 8])
    path.write_text("".join(f">p{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
    return path


def new_results(root: Path, world_size: int = 3) -> Results:
    (root / "results" / NAME).mkdir(parents=True)
    return Results(root / "results" / NAME, world_size)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, fasta: Path) -> Results:
    """Three complete shards that are not merged, with two, two, and one packs."""
    return new_results(tmp_path_factory.mktemp("embedded")).build(fasta).embed()


@pytest.fixture
def results(embedded: Results, tmp_path: Path) -> Results:
    shutil.copytree(embedded.results, tmp_path / "results")
    return Results(tmp_path / "results" / NAME, 3)


def test_from_the_index_to_the_merge(tmp_path: Path, fasta: Path) -> None:
    results = new_results(tmp_path).build(fasta)
    index = open_index(results.index)
    assert (index.num_packs, index.attributes["num_tokens"]) == (PACKS, TOKENS)
    run = results.progress()
    assert (run.shards, run.done, run.total, run.merged) == (0, Amount(), Amount(PACKS, TOKENS), False)
    with pytest.raises(SeqmillError, match="nope"):
        results.embed(model="untrained:nope", attempt=2)
    run = results.progress()
    assert run.states == {FAILED: 1, "waiting": 2}
    assert len(run.notes) == 1
    assert re.match(r"shard 0: failed at attempt 2: SeqmillError: .*'untrained:nope' is not known", run.notes[0])
    results.embed()
    run = results.progress()
    assert (run.states, run.done, run.merged, run.notes) == ({COMPLETE: 3}, Amount(PACKS, TOKENS), False, [])
    assert cells(run)[-1] == "not merged yet"
    results.merge()
    assert results.progress().merged
    for path in (*results.shards, results.index):  # users may do this after the merge
        path.unlink()
    run = results.progress()
    assert (run.merged, run.done, run.total) == (True, Amount(PACKS, TOKENS), Amount(PACKS, TOKENS))


def test_a_running_shard_counts_what_its_status_reports(results: Results) -> None:
    before = read_status(results.statuses[1])
    facts = replace(before.run, done_tokens=500, tokens_per_second=100.5)
    results.run(1, done_packs=1, resumed_packs=1, attempt=3, run=facts)
    results.statuses[2].unlink()
    results.shards[2].unlink()
    with locked_shard(results.shards[1]):
        run = results.progress()
    zero = read_status(results.statuses[0])
    assert run.states == {COMPLETE: 1, RUNNING: 1, "waiting": 1}
    assert run.done == Amount(zero.num_packs + 1, zero.run.num_tokens + 500)
    assert run.total == Amount(PACKS, TOKENS)
    assert run.resumed == 1
    assert run.rate == 100.5
    assert run.seconds == pytest.approx((TOKENS - run.done.tokens) / 100.5)
    assert run.notes == ["shard 1: running at attempt 3"]
    assert cells(run)[2:4] == [
        "1 of 3 shards done, 1 running, 1 waiting",
        f"{run.done.packs}/{PACKS} packs (1 by earlier attempts)",
    ]


def test_the_slowest_shard_decides_the_end(results: Results) -> None:
    for rank, rate in enumerate((1000, 1, 1000)):
        status = read_status(results.statuses[rank])
        results.run(rank, done_packs=0, run=replace(status.run, done_tokens=0, tokens_per_second=rate))
    slow = read_status(results.statuses[1]).run.num_tokens
    with locked_shard(results.shards[0]), locked_shard(results.shards[1]), locked_shard(results.shards[2]):
        run = results.progress()
    assert (run.rate, run.seconds) == (2001, slow)


def test_a_worker_that_is_gone_is_stale(results: Results) -> None:
    results.run(1, updated=ago(40))
    (note,) = results.progress().notes
    assert re.fullmatch(r"shard 1: stale, last heard of 4\d s ago, and no one holds its lock", note)
    # A killed worker leaves its lock file behind, which names this machine.
    with locked_shard(results.shards[1]):
        said = lock_path_of(results.shards[1]).read_text()
        assert results.progress().states == {COMPLETE: 2, RUNNING: 1}
    lock_path_of(results.shards[1]).write_text(said)
    assert results.progress().states == {COMPLETE: 2, "stale": 1}


def test_a_silent_worker_is_stale_though_it_holds_its_lock(results: Results) -> None:
    results.run(1, updated=ago(OLD_SECONDS + 61), attempt=2)
    with locked_shard(results.shards[1]):
        run = results.progress()
    assert run.states == {COMPLETE: 2, "stale": 1}
    assert run.notes == ["shard 1: stale at attempt 2, last heard of 6 min ago"]


def test_a_lock_of_another_machine_may_be_invisible_here(results: Results) -> None:
    results.run(1)
    lock_path_of(results.shards[1]).write_text("process 7 on node-17 since 2026-01-01 00:00:00")
    assert results.progress().states == {COMPLETE: 2, RUNNING: 1}
    results.run(1, updated=ago(OLD_SECONDS + 1))
    assert results.progress().states == {COMPLETE: 2, "stale": 1}


def test_a_shard_that_was_deleted_before_the_merge_waits(results: Results) -> None:
    results.shards[2].unlink()
    run = results.progress()
    assert run.states == {COMPLETE: 2, "waiting": 1}
    assert run.done.packs == PACKS - read_status(results.statuses[2]).num_packs


def test_the_newer_of_two_sets_of_shards_counts(results: Results) -> None:
    assert results.progress().shards == 3
    two = Results(results.folder, 2)
    two.embed()
    assert two.progress().shards == 2
    assert two.progress().states == {COMPLETE: 2}


def test_shards_of_an_earlier_index_will_be_computed_again(results: Results, tmp_path: Path) -> None:
    results.merge()
    assert results.progress().merged
    other = tmp_path / "other.faa"
    other.write_text(">a\nMKV\n")
    results.build(other)
    run = results.progress()
    assert (run.states, run.merged, run.done, run.total) == ({"waiting": 3}, False, Amount(), Amount(1, 5))


def test_shards_of_earlier_settings_will_be_computed_again(results: Results) -> None:
    results.merge()
    for rank in range(3):
        results.set_status(rank, updated=ago(60))
    other = Outputs((3,), ("mean",))
    embed_shard(results.task(1, outputs=other))
    run = results.progress()
    assert (run.states, run.merged, run.notes) == ({COMPLETE: 1, "waiting": 2}, False, [])
    assert run.done == Amount(2, read_status(results.statuses[1]).run.num_tokens)
    # The others also count as earlier settings while a worker runs, and after it has failed or was killed.
    results.run(1, done_packs=0)
    with locked_shard(results.shards[1]):
        assert results.progress().states == {RUNNING: 1, "waiting": 2}
    assert results.progress().states == {"stale": 1, "waiting": 2}
    results.set_status(1, status=FAILED, error=StatusError("Interrupted", "stopped"))
    assert results.progress().states == {FAILED: 1, "waiting": 2}
    # A worker that has not reported its fingerprint yet says nothing about the others.
    results.run(0, fingerprint={}, updated=ago(0))
    assert results.progress().states == {"stale": 1, FAILED: 1, "waiting": 1}


def test_failed_or_stopped_shards_of_earlier_settings_wait(results: Results) -> None:
    results.set_status(0, status=FAILED, error=StatusError("X", "y"), updated=ago(90))
    results.run(1, updated=ago(90))
    embed_shard(results.task(2, outputs=Outputs((3,), ("mean",))))
    run = results.progress()
    assert (run.states, run.notes) == ({COMPLETE: 1, "waiting": 2}, [])


def test_times_in_different_time_zones_are_compared(results: Results) -> None:
    for rank in range(3):
        results.set_status(rank, updated="2026-01-01T12:00:00+00:00")
    changed = {**read_status(results.statuses[0]).fingerprint, "fingerprint": "of other settings"}
    results.set_status(0, updated="2026-01-01T13:00:00+02:00", fingerprint=changed)
    assert results.progress().states == {COMPLETE: 2, "waiting": 1}
    results.set_status(0, updated="2026-01-01T11:00:00-02:00", fingerprint=changed)
    assert results.progress().states == {COMPLETE: 1, "waiting": 2}


def test_a_folder_without_an_index_is_being_built(results: Results) -> None:
    results.merge()
    other = results.results / "other" / results.folder.name
    logs = results.results.parent / "logs/other" / results.folder.name
    other.mkdir(parents=True)
    logs.mkdir(parents=True)  # Snakemake makes both before it starts a job
    for folder in (results.results, other.parent, other):
        run = progress_of(folder)[0]
        assert (run.name, run.merged, cells(run)[2]) == (f"other/{other.name}", False, "index being built")
    (logs / "build_index.log").write_text("12:00:00 INFO so\n12:00:01 ERROR p.faa: record 2: \x1b[2Jno\n")
    lines = lines_of(progress_of(results.results))
    assert "no index: its build has failed" in lines[0]
    assert lines[-1] == f"  other/{other.name}: index: p.faa: record 2: \\x1b[2Jno"
    shutil.rmtree(logs)  # not made by the workflow
    assert [run.name for run in progress_of(results.results)] == [NAME]
    (other / ".index.h5.node-17.4711.tmp").touch()
    assert [run.merged for run in progress_of(results.results)] == [False, True]


def test_rebuilding_the_index_makes_the_results_old(results: Results) -> None:
    results.merge()
    results.index.unlink()
    assert results.progress().merged  # users may do this after the merge
    temporary = results.folder / ".index.h5.node-17.4711.tmp"
    temporary.touch()
    merged = results.embeddings.stat().st_mtime_ns
    os.utime(temporary, ns=(merged + 1, merged + 1))
    run = results.progress()
    assert (run.merged, cells(run)[2]) == (False, "index being built")
    os.utime(temporary, ns=(merged - 1, merged - 1))  # left by an earlier build on another machine
    assert results.progress().merged


def test_an_index_that_could_not_be_built_is_shown_by_its_log(results: Results) -> None:
    root, error = results.results.parent, "12:00:01 ERROR p.faa: record 2: no\n"
    log = root / "logs/other" / results.folder.name / "build_index.log"
    log.parent.mkdir(parents=True)
    log.write_text(error)
    assert [run.name for run in progress_of(results.results)] == [f"other/{log.parent.name}", NAME]
    for folder in (results.results, results.results / "other", results.results / "other" / log.parent.name):
        run = progress_of(folder)[0]
        assert (cells(run)[2], run.notes) == ("no index: its build has failed", ["index: p.faa: record 2: no"])
    assert progress_of(results.folder)[0].states == {COMPLETE: 3}
    log.write_text("12:00:00 INFO so\n")
    assert [run.name for run in progress_of(results.results)] == [NAME]
    log.write_text(error)
    shutil.rmtree(results.results)
    assert [run.merged for run in progress_of(results.results)] == [False]
    with pytest.raises(SeqmillError, match="no such folder"):
        progress_of(root / "result")


def test_an_index_that_could_not_be_built_again_makes_the_results_old(results: Results) -> None:
    results.merge()
    results.index.unlink()
    log = results.results.parent / "logs" / NAME / "build_index.log"
    log.parent.mkdir(parents=True)
    log.write_text("12:00:01 ERROR p.faa: record 2: no\n")
    run = results.progress()
    assert (run.merged, run.notes) == (False, ["index: p.faa: record 2: no"])


def test_a_half_written_status_is_noted_and_stops_nothing(results: Results) -> None:
    whole = results.statuses[1].read_bytes()
    pieces = [whole[: len(whole) * part // 9] for part in range(9)]
    for text in (*pieces, b"[]", b"null", b"\xff\xfe", b"[" * 100_000, whole.replace(b'"complete"', b'"done"')):
        results.statuses[1].write_bytes(text)
        run = results.progress()
        assert run.states == {COMPLETE: 2, "unreadable": 1}, text[:80]
        assert run.total == Amount(PACKS, TOKENS)
        assert run.done.packs == PACKS - 2
        assert [note[:9] for note in run.notes] == ["shard 1: "]
    results.statuses[1].unlink()
    results.statuses[1].mkdir()
    assert results.progress().states == {COMPLETE: 2, "unreadable": 1}


@pytest.mark.parametrize(
    "value",
    [-5, 10**400, "many", None, [], {"a": 1}, float("nan"), float("inf"), True],
    ids=lambda value: repr(value)[:9],
)
@pytest.mark.parametrize("name", ["num_packs", "done_packs", "attempt", "num_tokens", "tokens_per_second", "load"])
def test_a_status_with_odd_numbers_is_unreadable(results: Results, name: str, value: object) -> None:
    content = json.loads(results.statuses[1].read_text())
    holder = content if name in content else content["seconds" if name == "load" else "run"]
    holder[name] = value
    results.statuses[1].write_text(json.dumps(content))
    run = results.progress()
    if value is None and holder is content["run"]:  # before it is known
        assert run.states == {COMPLETE: 3}
    else:
        assert run.states == {COMPLETE: 2, "unreadable": 1}
        (note,) = run.notes
        assert "shard_1-of-3.status.json: not a seqmill status JSON" in note
        assert name in note or name == "load" or isinstance(value, float)
    assert run.total == Amount(PACKS, TOKENS)
    assert lines_of([run, run])


@pytest.mark.parametrize("value", ["", "many", "2026-01-01", "\u00b2"])
def test_odd_times_in_a_status_do_no_harm(results: Results, value: str) -> None:
    facts = replace(read_status(results.statuses[1]).run, tokens_per_second=None)
    results.run(1, started=value, run=facts)
    with locked_shard(results.shards[1]):
        assert results.progress().states == {COMPLETE: 2, RUNNING: 1}
    results.set_status(1, updated=value)
    assert results.progress().states == {COMPLETE: 2, "stale": 1}


def test_with_a_damaged_index_the_shards_still_count(results: Results) -> None:
    results.index.write_bytes(results.index.read_bytes()[:1000])
    assert results.progress().total == Amount(PACKS, TOKENS)
    results.index.write_bytes(b"")
    assert results.progress().total == Amount(PACKS, TOKENS)


def test_other_files_are_not_runs(results: Results) -> None:
    (results.results / "notes").mkdir()
    (results.results / "notes/shards").write_text("a file")
    (results.results / "tiny/empty/shards").mkdir(parents=True)
    (results.results / "tiny/empty/shards/shard_5-of-2.h5.bak").touch()
    (results.folder / "shards/shard_7-of-3.h5").touch()  # no rank of three
    assert results.progress().states == {COMPLETE: 3}


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_the_folder_may_be_given_at_any_level(results: Results, levels: int) -> None:
    (run,) = progress_of([results.folder, *results.folder.parents][levels])
    assert (run.name, run.shards) == (NAME, 3)


def test_several_runs_are_summed() -> None:
    one = Progress("a/m", 2, {RUNNING: 1, COMPLETE: 1}, Amount(3, 300), Amount(4, 400), 1, 10.0, 10.0)
    other = Progress("b/m", 1, {"stale": 1}, Amount(1, 100), Amount(10, 1000), notes=["shard 0: stale"])
    total = total_of([one, other])
    assert (total.shards, total.done, total.total, total.resumed) == (3, Amount(4, 400), Amount(14, 1400), 1)
    assert (total.rate, total.seconds) == (10.0, 100.0)
    lines = lines_of([one, other])
    assert [line.split()[0] for line in lines] == ["a/m", "b/m", "all", "b/m:"]
    assert "1 of 3 shards done, 1 running, 1 stale" in lines[2]
    assert lines[2].endswith("2 min left")


def test_only_the_first_notes_are_shown() -> None:
    lines = lines_of([Progress("a/m", 9, {FAILED: 9}, notes=[f"shard {rank}: failed" for rank in range(9)])])
    assert len(lines) == 1 + 5 + 1
    assert lines[-1] == "  and 4 more shards"


def test_durations_in_words() -> None:
    seconds = (0.25, 59.4, 90, 3700, 90000, float("nan"))
    assert [time_in_words(value) for value in seconds] == [
        "0.2 s",
        "59 s",
        "2 min",
        "1 h 2 min",
        "1 d 1 h",
        "an unknown time",
    ]


def start(results: Results, *arguments: object, **streams: object) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPTS / "watch.py"), str(results.results), *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, "COLUMNS": "", "LINES": ""}, **streams)


def test_snakemake_prints_a_line_for_each_run_that_computes_when_it_has_got_on(results: Results) -> None:
    class Lines(io.StringIO):
        """A stream that ends the endless printing at its second line; the shard gets on after the first."""

        def flush(self) -> None:
            results.run(1, done_packs=1)
            if self.getvalue().count("\n") == 2:
                raise EOFError

    out = Lines()
    results.run(1, done_packs=0)
    with locked_shard(results.shards[1]), pytest.raises(EOFError):
        print_progress(results.results, [NAME], 0.001, out)
    first, second = out.getvalue().splitlines()
    assert re.match(rf"\d\d:\d\d:\d\d {NAME}, .*2 of 3 shards done, 1 running, 3/5 packs", first)
    assert "4/5 packs" in second


def test_in_a_pipe_each_change_is_a_line_until_all_is_merged(tmp_path: Path, fasta: Path) -> None:
    results = new_results(tmp_path, 2).build(fasta)
    with start(results, "--interval", 0.05, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as watch:
        lines = [watch.stdout.readline()]
        results.embed().merge()
        lines += watch.stdout.read().splitlines(keepends=True)
        assert watch.wait(30) == 0
    assert "no shard begun" in lines[0]
    assert lines[-1].endswith(f"100 %, 2 of 2 shards done, {PACKS}/{PACKS} packs, 3.51k/3.51k tokens, merged\n")
    assert all(re.match(r"\d\d:\d\d:\d\d tiny/", line) and "\x1b" not in line for line in lines)
    assert len({line[9:] for line in lines}) == len(lines)


def test_on_a_terminal_it_draws_in_place(results: Results) -> None:
    with watched(results, columns=60) as (watch, terminal):
        text = read_frames(terminal, 3)
        results.merge()
        text += read_rest(terminal)
        assert watch.wait(30) == 0
    assert re.sub(r"\s+", " ", text).count("done") >= 4
    first, *others = REDRAWN.split(text)
    before = first.count("\n")
    for up, frame in zip(others[::2], others[1::2], strict=True):
        assert up.count("\x1b[1A") == before > 0  # draws over the whole previous frame, whose cells are wrapped
        assert all(len(line) <= 60 for line in frame.split("\r\n"))
        before = frame.count("\n")


# What rich writes before it redraws: erase a line, then go up and erase for each further line.
REDRAWN = re.compile(r"\r\x1b\[2K((?:\x1b\[1A\x1b\[2K)*)")


@contextmanager
def watched(results: Results, columns: int = 300) -> Iterator[tuple[subprocess.Popen, int]]:
    """Watch on a terminal; yield the program and the file descriptor of its output."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    with start(results, "--interval", 0.05, stdout=theirs) as watch:
        os.close(theirs)
        try:
            yield watch, ours
        finally:
            watch.kill()
    os.close(ours)


def read_frames(terminal: int, number: int) -> str:
    """Return the output up to the N-th redraw; each redraw shows that another look followed."""
    text = ""
    while len(REDRAWN.findall(text)) < number:
        text += os.read(terminal, 4096).decode()
    return text


def read_rest(terminal: int) -> str:
    text = ""
    with suppress(OSError):  # the terminal was closed
        while data := os.read(terminal, 4096):
            text += data.decode()
    return text


def read_last_frame(terminal: int) -> str:
    return REDRAWN.split(read_rest(terminal))[-1]


def test_it_keeps_watching_while_an_index_is_built(results: Results) -> None:
    results.merge()
    other = results.results / "other" / results.folder.name
    other.mkdir(parents=True)
    (other / ".index.h5.node-17.4711.tmp").touch()
    with watched(results) as (watch, terminal):
        assert "index being built" in read_frames(terminal, 3)
        shutil.rmtree(other)
        last = read_last_frame(terminal)
        assert watch.wait(30) == 0
    assert "merged" in last
    assert "index being built" not in last


def test_it_keeps_watching_while_a_running_workflow_may_compute_again(results: Results) -> None:
    results.merge()
    claim, alone = claim_folder(results.results.parent)
    assert alone
    with watched(results) as (watch, terminal):
        text = read_frames(terminal, 3)
        assert re.search(rf"merged *\r\n{STILL_ALIVE}", text)
        results.run(0)  # its first shard starts
        with locked_shard(results.shards[0]):
            while "1 running" not in text:
                text += read_frames(terminal, 1)
        results.embed().merge()
        assert watch.poll() is None
        claim.close()
        last = read_last_frame(terminal)
        assert watch.wait(30) == 0
    assert re.search(r"merged *\r\n", last)
    assert STILL_ALIVE not in last


def test_it_does_not_wait_for_a_workflow_in_another_folder(results: Results, tmp_path_factory) -> None:
    results.merge()
    claim_folder(results.results.parent)[0].close()  # a finished workflow leaves its lock file
    claim, _ = claim_folder(tmp_path_factory.mktemp("elsewhere"))
    with claim, start(results, "--interval", 0.05, stdout=subprocess.DEVNULL) as watch:
        assert watch.wait(30) == 0


def test_watching_does_not_disturb_the_workflow_lock(results: Results) -> None:
    results.merge()
    claim_folder(results.results.parent)[0].close()
    before = (results.results.parent / ".snakemake/seqmill.running").read_bytes()
    assert run_script("watch.py", results.results).returncode == 0
    claim, alone = claim_folder(results.results.parent)
    claim.close()
    assert alone
    assert (results.results.parent / ".snakemake/seqmill.running").read_bytes() == before


CONTROLS = "a\x1b[2J\x07b\x7f\u202e\udcff\n c"


def test_messages_contain_no_terminal_control_characters() -> None:
    assert in_one_line(CONTROLS) == r"a\x1b[2J\x07b\x7f\u202e\udcff c"
    assert in_one_line("蛋白 µ-ñ") == "蛋白 µ-ñ"
    assert len(in_one_line("x" * 500)) == 404


def test_names_and_errors_contain_no_terminal_control_characters(results: Results) -> None:
    odd = Results(results.results / "a\x1b[2Jb\udcff" / results.folder.name, 3)
    shutil.copytree(results.folder, odd.folder)
    odd.set_status(1, status=FAILED, error={"type": "E\x1b[1A", "message": "no\x1b[31m [red]:x:[/]"})
    odd.statuses[2].write_text('{"\\u001b[2J": 1}')
    done = run_script("watch.py", "--once", results.results)
    assert done.returncode == 0
    assert done.stdout.count(r"a\x1b[2Jb\udcff/") == 3  # its line, two notes
    assert r"E\x1b[1A: no\x1b[31m [red]:x:[/]" in done.stdout
    assert "unreadable" in done.stdout
    missing = run_script("watch.py", "--once", results.results / "x\x1b[2J")
    assert missing.returncode == 1
    assert r"x\x1b[2J: no such folder" in missing.stderr
    for text in (done.stdout, missing.stderr):
        assert all(letter.isprintable() or letter == "\n" for letter in text)


def test_once_prints_and_exits(results: Results) -> None:
    done = run_script("watch.py", "--once", results.results)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.rstrip() for line in done.stdout.splitlines()] == lines_of([results.progress()])


def test_a_missing_folder_and_a_folder_without_runs_are_reported(tmp_path: Path) -> None:
    for folder, reason in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "no run has begun")):
        done = run_script("watch.py", "--once", folder)
        assert done.returncode == 1
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert f"{folder}: {reason}" in done.stderr


def test_watching_imports_no_torch() -> None:
    code = "import sys, seqmill.run.watch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SCRIPTS)}).returncode == 0
