"""What state each shard is in, by its lock, its status JSON and its file."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from seqmill.base.files import sha256_of_file
from seqmill.base.locks import lock_holder, lock_path_of
from seqmill.base.words import ago, in_one_line, size_in_words
from seqmill.run.findings import Finding, Mend, Stats, attempt, exists, last_error, shown, trouble_with
from seqmill.spec.fingerprint import Fingerprint
from seqmill.store.index import Index
from seqmill.store.layout import embed_log, status_path_of
from seqmill.store.shards import open_shard
from seqmill.store.status import COMPLETE, FAILED, RUNNING, ShardStatus, read_status

DISK_FULL = ("make room", *map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))


class ShardState(NamedTuple):
    """A rank's shard: what is the matter with it, None if it is complete; its status if that is readable."""

    path: Path
    finding: Finding | None
    status: ShardStatus | None


def shard_state(folder: Path, rank: int, size: int, files: Stats, index: Index | None, check: bool) -> ShardState:
    path = folder / f"shards/shard_{rank}-of-{size}.h5"
    status_path, status, trouble = status_path_of(path), None, None
    if status_path.name in files:
        status, trouble = attempt(status_path, read_status)
    redo = (Mend.REMOVE, shown(path)) if path.name in files else (Mend.RUN, "")
    try:
        finding = _judge(path, status, trouble, redo, files)
        if finding is None and (wrong := _wrong_with(path, files[path.name].st_size, status, index, check)):
            finding = Finding(wrong, *redo)
    except Exception as error:  # a damaged file may make h5py raise anything
        finding = trouble_with(path, error)
        finding = finding if finding.mend == Mend.ACCESS else Finding(finding.text, *redo)
    return ShardState(path, finding, status)


def _judge(
    path: Path, status: ShardStatus | None, trouble: Finding | None, redo: tuple[Mend, str], files: Stats
) -> Finding | None:
    """Return what is the matter with a shard by its lock and its status JSON; None if that says it is complete."""
    if lock_path_of(path).name in files and (holder := lock_holder(path)):
        return Finding(f"running: {_progress(status)}; {holder} holds its lock", Mend.WAIT)
    if trouble:
        return trouble if trouble.mend == Mend.ACCESS else Finding(trouble.text, *redo)
    if status is None:
        state = "has no status JSON" if path.name in files else "never started"
        return Finding(state + last_error(embed_log(path)), *redo)
    if status.status == RUNNING:
        gone = "its worker is gone without a word (killed?), no one holds its lock"
        return Finding(f"{gone}: {_progress(status)}", *redo)
    if status.status == FAILED:
        return _failed(path.parent.parent, status, redo)
    if path.name not in files:
        return Finding("complete by its status JSON, but the file is missing", *redo)
    return None


def _failed(folder: Path, status: ShardStatus, redo: tuple[Mend, str]) -> Finding:
    message = in_one_line(status.reason)
    text = f"failed at attempt {status.attempt}: {message}"
    if status.error and status.error.type == "Interrupted":
        return Finding(text, *redo)
    if "build the index again" in message:
        return Finding(text, Mend.REMOVE, shown(folder / "index.h5"))
    step = "mend what the error says"
    if any(words in message for words in DISK_FULL):
        step = f"free disk space, {size_in_words(shutil.disk_usage(folder).free)} are free now"
    elif "no finite embedding" in message:
        step = "check the weights, or set on_error: skip to leave such sequences out"
    return Finding(text, Mend.REPAIR, step)


def _wrong_with(path: Path, size: int, status: ShardStatus, index: Index | None, check: bool) -> str:
    """Return what is wrong with a shard whose status JSON says it is complete; empty if nothing is."""
    if size != status.shard_bytes:
        return f"the file has {size} bytes, its status JSON says {status.shard_bytes}: truncated or changed"
    fingerprint = open_shard(path).fingerprint
    if difference := fingerprint.difference(Fingerprint.from_attributes(status.fingerprint)):
        return f"the file and its status JSON differ: {difference}"
    if index and fingerprint.index_digest != index.digest:
        return "made from another index than index.h5"
    if status.audit.verdict == "fail":
        return f"its audit failed, the embeddings are wrong: worst cosine {status.audit.worst_cosine}"
    if check and sha256_of_file(path) != status.shard_sha256:
        return "its SHA-256 is not the one in its status JSON: damaged or changed"
    return ""


def shard_findings(shards: list[ShardState]) -> Iterator[Finding]:
    """Yield how many are complete and what is the matter with the others; what several have alike is said once."""
    done = sum(state.finding is None for state in shards)
    yield Finding(f"shards: {done} of {len(shards)} complete" if shards else "shards: none begun", Mend(not shards))
    alike: dict[Finding, list[Path]] = {}
    for state in shards:
        if state.finding:
            alike.setdefault(state.finding, []).append(state.path)
    for finding, paths in alike.items():
        places = (embed_log(paths[0]), status_path_of(paths[0]))
        see = ", ".join(shown(path) for path in places if exists(path))
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        yield finding._replace(text=f"{paths[0].stem}{more}: {finding.text}" + (f"\n    see {see}" if see else ""))


def is_at_work(state: ShardState) -> bool:
    """Return whether a shard without a file is computed or has failed, rather than been deleted after the merge."""
    begun = state.status is not None and state.status.status != COMPLETE
    return begun or (state.finding is not None and state.finding.mend > Mend.RUN)


def _progress(status: ShardStatus | None) -> str:
    if status is None:
        return "no status yet"
    return f"{status.done_packs} of {status.num_packs} packs, status updated {ago(status.updated)}"
