"""What is wrong with each shard, and what to do about it."""

import errno
import os
import shutil
from collections.abc import Iterator
from typing import NamedTuple

from seqmill.base.files import sha256_of_file
from seqmill.base.words import ago, in_one_line, size_in_words
from seqmill.run.findings import Finding, Remedy, shown, trouble_with
from seqmill.run.shard_state import STALE, WAITING, ShardState, judge_shard
from seqmill.run.walk import FoundRun, exists, last_error
from seqmill.spec.fingerprint import Fingerprint
from seqmill.store.index import Index
from seqmill.store.layout import RunFolder, status_path_of
from seqmill.store.shards import open_shard
from seqmill.store.status import FAILED, RUNNING, ShardStatus

DISK_FULL = ("make room", *map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))


class ExaminedShard(NamedTuple):
    """A shard, and what is wrong with it; None if it is complete."""

    shard: ShardState
    finding: Finding | None


def examine_shard(run: FoundRun, rank: int, world_size: int, index: Index | None, check: bool) -> ExaminedShard:
    shard = judge_shard(run.shard(rank, world_size), run.files)
    again = (Remedy.REMOVE, shown(shard.path)) if shard.has_file else (Remedy.RUN, "")
    try:
        finding = _finding(run, shard, again)
        if finding is None and shard.status and (wrong := _defect(shard, shard.status, index, check)):
            finding = Finding(wrong, *again)
    except Exception as error:  # h5py may raise anything for a damaged file
        finding = trouble_with(shard.path, error)
        finding = finding if finding.remedy == Remedy.ACCESS else Finding(finding.text, *again)
    return ExaminedShard(shard, finding)


def _finding(run: RunFolder, shard: ShardState, again: tuple[Remedy, str]) -> Finding | None:
    """Return what is wrong with a shard by its state; None if it is complete."""
    if shard.holder:
        return Finding(f"running: {_progress(shard.status)}; {shard.holder} holds its lock", Remedy.WAIT)
    if shard.state == RUNNING:
        return Finding(f"running: {_progress(shard.status)}; its worker is on another machine", Remedy.WAIT)
    if shard.trouble:
        return shard.trouble if shard.trouble.remedy == Remedy.ACCESS else Finding(shard.trouble.text, *again)
    if shard.state == WAITING:
        state = "has no status JSON" if shard.has_file else "never started"
        return Finding(state + last_error(run.shard_log(shard.path)), *again)
    if shard.state == STALE:
        return Finding(f"its worker is gone (killed?), no one holds its lock: {_progress(shard.status)}", *again)
    if shard.state == FAILED and shard.status:
        return _failed(run, shard.status, again)
    return None if shard.has_file else Finding("complete by its status JSON, but the file is missing", *again)


def _failed(run: RunFolder, status: ShardStatus, again: tuple[Remedy, str]) -> Finding:
    message = in_one_line(status.reason)
    text = f"failed at attempt {status.attempt}: {message}"
    if status.error and status.error.type == "Interrupted":
        return Finding(text, *again)
    if "build the index again" in message:
        return Finding(text, Remedy.REMOVE, shown(run.index))
    step = "fix what the error says"
    if any(words in message for words in DISK_FULL):
        step = f"free disk space, {size_in_words(shutil.disk_usage(run.path).free)} are free now"
    elif "no finite embedding" in message:
        step = "check the weights, or set on_error: skip to leave such sequences out"
    return Finding(text, Remedy.REPAIR, step)


def _defect(shard: ShardState, status: ShardStatus, index: Index | None, check: bool) -> str:
    """Return what is wrong with a shard that is complete by its status JSON; empty if nothing is."""
    if (size := shard.path.stat().st_size) != status.shard_bytes:
        return f"the file has {size} bytes, its status JSON says {status.shard_bytes}: truncated or changed"
    fingerprint = open_shard(shard.path).fingerprint
    if difference := fingerprint.difference(Fingerprint.from_attributes(status.fingerprint)):
        return f"the file and its status JSON differ: {difference}"
    if index and fingerprint.index_digest != index.digest:
        return "made from another index than index.h5"
    if status.audit.verdict == "fail":
        return f"its audit failed, the embeddings are wrong: worst cosine {status.audit.worst_cosine}"
    if check and sha256_of_file(shard.path) != status.shard_sha256:
        return "its SHA-256 is not the one in its status JSON: damaged or changed"
    return ""


def shard_findings(run: RunFolder, shards: list[ExaminedShard]) -> Iterator[Finding]:
    """Yield how many shards are complete, and once for all shards alike what is wrong with the others."""
    done = sum(finding is None for _, finding in shards)
    yield Finding(f"shards: {done} of {len(shards)} complete" if shards else "shards: none begun", Remedy(not shards))
    for finding in dict.fromkeys(finding for _, finding in shards if finding):
        first, *others = (shard.path for shard, found in shards if found == finding)
        evidence = ", ".join(shown(path) for path in (run.shard_log(first), status_path_of(first)) if exists(path))
        more = f" and {len(others)} more" if others else ""
        see = f"\n    see {evidence}" if evidence else ""
        yield finding._replace(text=f"{first.stem}{more}: {finding.text}{see}")


def _progress(status: ShardStatus | None) -> str:
    if status is None:
        return "no status yet"
    return f"{status.done_packs} of {status.num_packs} packs done, status updated {ago(status.updated)}"
