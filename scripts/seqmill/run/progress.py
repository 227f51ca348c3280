"""How far runs have come, by the status JSONs of their shards. Only reads, and imports no torch.

The workers may run on any machine that shares the disk: this one, or nodes of a cluster.
"""

import functools
import math
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from seqmill.base.input_files import DIGESTS, InputFile, KnownDigests, find_change
from seqmill.base.words import in_one_line
from seqmill.errors import SeqmillError
from seqmill.run.shard_state import WAITING, ShardState, judge_shard, seconds_of
from seqmill.run.stale import DAMAGED, read_facts
from seqmill.run.walk import FoundRun, find_runs
from seqmill.store.layout import status_path_of
from seqmill.store.status import COMPLETE, FAILED, RUNNING, ShardStatus

BUILDING, NOT_BUILT = "index being built", "no index: its build has failed"


@dataclass(frozen=True)
class Amount:
    """Work in packs and tokens."""

    packs: int = 0
    tokens: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.packs + other.packs, self.tokens + other.tokens)


@dataclass
class Progress:
    """The progress of a run, or of several; equal if its amounts and states are."""

    name: str  # dataset/model
    shards: int = 0  # how many; 0 if none has begun
    states: Counter[str] = field(default_factory=Counter)  # the number of shards in each state of `ShardState`
    done: Amount = Amount()
    total: Amount = Amount()  # zero while the index is built
    resumed: int = 0  # packs done by earlier attempts
    rate: float = field(default=0.0, compare=False)  # tokens per second of all running shards
    # Until the last shard is complete, at this rate; nan if unknown.
    seconds: float = field(default=math.nan, compare=False)
    merged: bool = False  # whether the merged result is up to date
    notes: list[str] = field(default_factory=list, compare=False)  # on shards that are stale, failed or tried again
    missing: str = ""  # why there is no index yet; all else is unknown then
    root: Path = Path()  # the working directory of the workflow


def progress_of(results: Path) -> list[Progress]:
    """Return the progress of each run in `results/`, `results/DATASET/` or `results/DATASET/MODEL/`.

    What can't be read counts as not done, with a note. Raise a SeqmillError if there is no such folder, and an OSError
    if none of it can be listed.
    """
    runs = find_runs(results)
    if not runs and not results.is_dir():
        raise SeqmillError(f"{in_one_line(results)}: no such folder; name a folder of results, or start the run first")
    errors = [run.error for run in runs if run.error]
    if errors and len(errors) == len(runs):
        raise errors[0]
    return [_progress(run) for run in runs if not run.error]


def _progress(run: FoundRun) -> Progress:
    result = Progress(run.name, root=run.root)
    sizes = run.world_sizes()
    if run.index not in run.files:
        if error := run.build_error():
            result.missing, result.notes = NOT_BUILT, [f"index{error}"]
            return result
        merged = run.time_of(run.embeddings)
        if run.time_of_build() > merged or not (merged or sizes):  # else the index was deleted after the merge
            result.missing = BUILDING
            return result
    total, facts = None, read_facts(run.index) or {}
    with suppress(*DAMAGED):  # the index is absent or damaged, or the FASTA can't be read here
        total = Amount(int(facts["num_packs"]), int(facts["num_tokens"]))
        fasta = InputFile.fasta_of(facts)
        if change := find_change([fasta], [run.root / fasta.path], _digests(run.root).sha256):
            result.notes.append(in_one_line(f"the input has changed: it was {change.before} and is {change.now} now"))
    result.shards = sizes[-1] if sizes else 0
    paths = run.all_shards(result.shards)
    slowest = _add_shards(result, [judge_shard(path, run.files) for path in paths], run, facts.get("index_digest"))
    result.total = total or result.total
    is_complete = result.states[COMPLETE] == result.shards
    if sizes and is_complete:
        result.done = result.total
    if result.rate:
        result.seconds = max((result.total.tokens - result.done.tokens) / result.rate, slowest)
    newest = max(map(run.time_of, paths), default=0)
    result.merged = run.embeddings in run.files and is_complete and run.time_of(run.embeddings) >= newest
    return result


def _add_shards(result: Progress, shards: list[ShardState], run: FoundRun, digest: object) -> float:
    """Add the shards to the result, with the total of their status JSONs; return the seconds that the slowest needs."""
    slowest = 0.0
    current = _current_fingerprint([shard.status for shard in shards if shard.status], run)
    for rank, shard in enumerate(shards):
        state, status, note = shard.state, shard.status, _note(shard)
        if status and state != RUNNING and _is_of_another(status, digest, current):
            state, note = WAITING, ""
        elif state == COMPLETE and not shard.has_file and run.embeddings not in run.files:
            state = WAITING  # deleted before the merge, so it is computed again
        result.states[state] += 1
        if note:
            result.notes.append(f"shard {rank}: {note}")
        if status is None:
            continue
        done, total = _amounts(status, state)
        result.total += total
        result.done += done
        result.resumed += min(status.resumed_packs, done.packs)
        if state == RUNNING and (rate := status.run.tokens_per_second):
            result.rate += rate
            slowest = max(slowest, (total.tokens - done.tokens) / rate)
    return slowest


def _note(shard: ShardState) -> str:
    if shard.trouble:
        return shard.trouble.text
    status = shard.status
    tried = f" at attempt {status.attempt}" if status and status.attempt > 1 else ""
    if status and shard.state == FAILED:
        return in_one_line(f"failed{tried}: {status.reason}")
    doubt = f", {shard.doubt}" if shard.doubt else ""
    return f"{shard.state}{tried}{doubt}" if shard.state != COMPLETE and (tried or doubt) else ""


def _current_fingerprint(statuses: list[ShardStatus], run: FoundRun) -> object:
    """Return the fingerprint of the status JSON that was updated last; None if none has one."""
    known = [status for status in statuses if status.fingerprint.get("fingerprint")]

    def time_of(status: ShardStatus) -> tuple[float, int]:  # within one second, by the times of their files
        return seconds_of(status.updated), run.time_of(status_path_of(run.shard(status.rank, status.world_size)))

    last = max(known, key=time_of, default=None)
    return last.fingerprint["fingerprint"] if last else None


def _is_of_another(status: ShardStatus, digest: object, current: object) -> bool:
    """Return whether a shard is of another index or of other settings, so that it will be computed again."""
    is_other_index = digest is not None and status.fingerprint.get("index_digest", digest) != digest
    return is_other_index or status.fingerprint.get("fingerprint", current) != current


def _amounts(status: ShardStatus, state: str) -> tuple[Amount, Amount]:
    """Return the work done on a shard, and all of it."""
    total = Amount(status.num_packs, status.run.num_tokens or 0)
    if state in (COMPLETE, WAITING):
        return total if state == COMPLETE else Amount(), total
    packs = min(status.done_packs, total.packs)
    tokens = status.run.done_tokens or (total.tokens * packs // total.packs if packs else 0)
    return Amount(packs, min(tokens, total.tokens)), total


@functools.cache
def _digests(root: Path) -> KnownDigests:
    """Return one for all looks, so that a changed FASTA is digested once."""
    return KnownDigests(root / DIGESTS)
