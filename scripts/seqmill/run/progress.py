"""How far runs have come, by the status JSONs of their shards. Reads only, and imports no torch.

The workers may run anywhere that shares the disk: here, or as jobs of a cluster.
"""

from __future__ import annotations

import functools
import math
import re
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from seqmill.base.files import sha256_of_file
from seqmill.base.hdf5 import open_hdf5, read_attributes
from seqmill.base.input_files import InputFile, find_change, stamp_of
from seqmill.base.locks import lock_holder, lock_path_of
from seqmill.base.words import ago, in_one_line
from seqmill.errors import SeqmillError
from seqmill.run.findings import Stats, build_error, entries_of, exists, unbuilt
from seqmill.store.layout import SHARD_FILE, logs_folder, root_of
from seqmill.store.status import COMPLETE, FAILED, RUNNING, ShardStatus, read_status

# A worker writes its status every half a minute, but not while a pack is computed that takes longer.
OLD_SECONDS = 300.0
DEPTH = 2  # of a run's folder below results
STALE, WAITING, UNREADABLE = "stale", "waiting", "unreadable"
BUILDING, NOT_BUILT = "index being built", "no index: its build has failed"
UNFINISHED_INDEX = re.compile(r"\.index\.h5\..+\.tmp")


@dataclass(frozen=True)
class Amount:
    """Work in packs and tokens."""

    packs: int = 0
    tokens: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.packs + other.packs, self.tokens + other.tokens)


@dataclass
class Progress:
    """How far a dataset and a model, or several, have come.

    Attributes:
        name: dataset/model.
        shards: their number; 0 if none has begun.
        states: how many shards there are of each state; `complete` among them.
        done, total: total is zero while the index is built.
        resumed: packs that earlier attempts had done.
        rate: tokens a second of all running shards.
        seconds: to the end of the last shard, at this rate; nan if that can't be told.
        merged: whether the results are there.
        notes: of shards that are stale, failed or at a later attempt, in words.
        missing: what is said where there is no index to begin with; all else is unknown then.
        folder: where its results lie.
    """

    name: str
    shards: int = 0
    states: dict[str, int] = field(default_factory=dict)
    done: Amount = Amount()
    total: Amount = Amount()
    resumed: int = 0
    rate: float = 0.0
    seconds: float = math.nan
    merged: bool = False
    notes: list[str] = field(default_factory=list)
    missing: str = ""
    folder: Path = Path()


def progress_of(results: Path) -> list[Progress]:
    """Return how far each run in `results/`, `results/DATASET/` or `results/DATASET/MODEL/` has come.

    What can't be read counts as not done, and is said.

    Raises:
        SeqmillError: no such folder.
    """
    # A link keeps its name: it tells the dataset.
    folder = results.resolve() if ".." in results.parts else results.absolute()
    failed = [_progress(path, {}, {}) for path in unbuilt(folder)]
    if not failed and not results.is_dir():
        raise SeqmillError(f"{in_one_line(results)}: no such folder; name one of results, and begin the run first")
    found = list(_runs(folder, DEPTH)) if results.is_dir() else []
    return sorted([*found, *failed], key=lambda run: run.folder)


def _runs(folder: Path, depth: int) -> Iterator[Progress]:
    """Look for folders of a dataset and a model, at most `depth` levels down."""
    try:
        names = entries_of(folder)
        files = entries_of(folder / "shards") if "shards" in names else {}
    except OSError as error:
        if depth == DEPTH and not isinstance(error, FileNotFoundError):
            raise
        return
    begun = {"index.h5", "embeddings.h5"} & names.keys() or any(map(SHARD_FILE.fullmatch, files))
    # The workflow makes both folders before it builds the index, which has no name until it is nearly there.
    if begun or any(map(UNFINISHED_INDEX.fullmatch, names)) or exists(logs_folder(folder)):
        yield _progress(folder, names, files)
    elif depth:
        for name in sorted(name for name in names if stat.S_ISDIR(names[name].st_mode)):
            yield from _runs(folder / name, depth - 1)


def _progress(folder: Path, names: Stats, files: Stats) -> Progress:
    """Judge one run; `names` are the folder's entries, `files` those of its shards."""
    result = Progress(f"{folder.parent.name}/{folder.name}", folder=folder)
    matches = [match for name in files if (match := SHARD_FILE.fullmatch(name)) and int(match[1]) < int(match[2])]
    # Of several sets of shards the one that was touched last.
    newest = max(matches, key=lambda match: files[match[0]].st_mtime_ns, default=None)
    error = "" if "index.h5" in names else build_error(folder)
    if error or _waits_for_index(names, bool(matches)):
        result.missing, result.notes = (NOT_BUILT, [f"index{error}"]) if error else (BUILDING, [])
        return result
    result.shards = int(newest[2]) if newest else 0
    said, remaining = Amount(), [0.0]
    total_of_index, digest, fasta = _totals(folder / "index.h5", names)
    with suppress(OSError):  # it can't be read here
        if fasta and (change := find_change([fasta], [root_of(folder) / fasta.path], _sha256)):
            result.notes.append(in_one_line(f"the input has changed: it was {change.before} and is {change.now} now"))
    ranks = sorted({int(match[1]) for match in matches if int(match[2]) == result.shards})
    shards = [folder / f"shards/shard_{rank}-of-{result.shards}.h5" for rank in ranks]
    judged = [_shard_state(shard, files, "embeddings.h5" in names) for shard in shards]
    current = _last_fingerprint([status for _, status, _ in judged if status], files)
    for rank, (state, status, note) in zip(ranks, judged, strict=True):
        if status and state != RUNNING and _is_of_another(status, digest, current):
            state, note = WAITING, ""
        result.states[state] = result.states.get(state, 0) + 1
        if note:
            result.notes.append(f"shard {rank}: {note}")
        if status is None:
            continue
        done, total = _amounts(status, state)
        said += total
        result.done += done
        result.resumed += min(status.resumed_packs, done.packs)
        if state == RUNNING and (rate := _rate(status, done)):
            result.rate += rate
            remaining.append((total.tokens - done.tokens) / rate)
    waiting = result.shards - sum(result.states.values())
    if waiting > 0:
        result.states[WAITING] = result.states.get(WAITING, 0) + waiting
    result.total = total_of_index or said
    complete = result.states.get(COMPLETE, 0) == result.shards
    if result.shards and complete:
        result.done = result.total
    if result.rate:
        result.seconds = max((result.total.tokens - result.done.tokens) / result.rate, *remaining)
    times = [files[name].st_mtime_ns for name in files if name.endswith(f"-of-{result.shards}.h5")]
    merged = names.get("embeddings.h5")
    result.merged = merged is not None and complete and merged.st_mtime_ns >= max(times, default=0)
    return result


def _waits_for_index(names: Stats, begun: bool) -> bool:
    """Return whether there is no index, and one is needed or built: after the merge it may have been deleted."""
    if "index.h5" in names:
        return False
    merged = names["embeddings.h5"].st_mtime_ns if "embeddings.h5" in names else 0
    times = [names[name].st_mtime_ns for name in names if UNFINISHED_INDEX.fullmatch(name)]
    return max(times, default=0) > merged or not (merged or begun)


def _last_fingerprint(statuses: list[ShardStatus], files: Stats) -> object:
    """Return the fingerprint of the status that was updated last, of those that have one; None if none has."""
    known = [status for status in statuses if status.fingerprint.get("fingerprint")]

    def age(status: ShardStatus) -> tuple[float, int]:  # of two in one second by their files
        file = files.get(f"shard_{status.rank}-of-{status.world_size}.status.json")
        return _seconds_of(status.updated), file.st_mtime_ns if file else 0

    last = max(known, key=age, default=None)
    return last.fingerprint["fingerprint"] if last else None


def _is_of_another(status: ShardStatus, digest: str, current: object) -> bool:
    """Return whether a status is of another index or of other settings, so that its shard will be computed again."""
    other_index = digest and status.fingerprint.get("index_digest", digest) != digest
    return bool(other_index) or status.fingerprint.get("fingerprint", current) != current


def _shard_state(shard: Path, files: Stats, merged: bool) -> tuple[str, ShardStatus | None, str]:
    """Return a shard's state, its status JSON (None if none can be read), and what is to be said of it.

    `merged` says whether there is a merged file.
    """
    path = shard.with_suffix(".status.json")
    if path.name not in files:
        return WAITING, None, ""
    try:
        status = _read(path, files[path.name].st_mtime_ns, files[path.name].st_size)
        reason = _why_stale(shard, status) if status.status == RUNNING else ""
        if reason:  # or it has ended between the two looks
            status = read_status(path)
    except SeqmillError as error:
        return UNREADABLE, None, in_one_line(str(error))
    tried = f" at attempt {status.attempt}" if status.attempt > 1 else ""
    if status.status == FAILED:
        return FAILED, status, in_one_line(f"failed{tried}: {status.reason}")
    if status.status == RUNNING:
        state = STALE if reason else RUNNING
        return state, status, f"{state}{tried}{reason}" if tried or reason else ""
    # A shard that was deleted before the merge will be computed again.
    return (COMPLETE if shard.name in files or merged else WAITING), status, ""


@functools.lru_cache(4096)
def _read(path: Path, mtime_ns: int, size: int) -> ShardStatus:
    return read_status(path)


def _why_stale(shard: Path, status: ShardStatus) -> str:
    """Return why a worker that says it runs may not; empty if nothing speaks for that.

    That a lock is free can be seen for sure only on the machine of its worker: not all file systems tell others.
    """
    heard = f", last heard of {ago(status.updated)}"
    if lock_holder(shard):
        return heard if _is_old(status.updated) else ""
    try:
        here = f" on {socket.gethostname()} since " in lock_path_of(shard).read_text(errors="replace")
    except OSError as error:
        here = isinstance(error, FileNotFoundError)
    if here:
        return f"{heard}, and no one holds its lock"
    return heard if _is_old(status.updated) else ""


def _is_old(when: str) -> bool:
    return time.time() - _seconds_of(when) > OLD_SECONDS


def _seconds_of(when: str) -> float:
    """Return an ISO 8601 time in seconds since 1970; minus infinity if it is none."""
    try:
        return datetime.fromisoformat(when).timestamp()
    except (ValueError, OverflowError, OSError):
        return -math.inf


def _amounts(status: ShardStatus, state: str) -> tuple[Amount, Amount]:
    """Return what is done of a shard, and all of it."""
    total = Amount(status.num_packs, status.run.num_tokens or 0)
    if state == COMPLETE:
        return total, total
    if state == WAITING:
        return Amount(), total
    packs = min(status.done_packs, total.packs)
    tokens = status.run.done_tokens or (total.tokens * packs // total.packs if packs else 0)
    return Amount(packs, min(tokens, total.tokens)), total


def _rate(status: ShardStatus, done: Amount) -> float:
    """Return the tokens a second of a running shard, 0 if unknown: as it says, or judged by the packs done so far."""
    if status.run.tokens_per_second:
        return status.run.tokens_per_second
    packs = done.packs - status.resumed_packs
    with suppress(ValueError, TypeError, OverflowError):
        seconds = (datetime.fromisoformat(status.updated) - datetime.fromisoformat(status.started)).total_seconds()
        seconds -= sum(status.seconds.values())  # stages that are over: the computation is not
        if packs > 0 and seconds > 0:
            return done.tokens * packs / done.packs / seconds
    return 0.0


def _totals(index: Path, names: Stats) -> tuple[Amount | None, str, InputFile | None]:
    """Return the work in the index, its digest, and the FASTA it was made from; nothing if none can be read."""
    if index.name not in names:
        return None, "", None
    try:
        return _read_totals(index, names[index.name].st_mtime_ns, names[index.name].st_size)
    except SeqmillError:
        return None, "", None


@functools.lru_cache(256)
def _read_totals(index: Path, mtime_ns: int, size: int) -> tuple[Amount, str, InputFile]:
    with open_hdf5(index, "index") as file:
        facts = read_attributes(file)
        amount = Amount(_count(facts["num_packs"]), _count(facts["num_tokens"]))
        return amount, str(facts["index_digest"]), InputFile.fasta_of(facts)


def _sha256(path: Path) -> str:
    return _sha256_by_stamp(path, stamp_of(path.stat()))


@functools.lru_cache(256)
def _sha256_by_stamp(path: Path, stamp: str) -> str:
    return sha256_of_file(path)


def _count(value: object) -> int:
    """Return a number of a status as a whole one, 0 if it can't be that: whatever may lie there must do no harm."""
    try:
        return min(max(int(value), 0), 1 << 62)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return 0
