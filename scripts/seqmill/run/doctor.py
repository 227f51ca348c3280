"""Examines results: only reads, never fails on a damaged file, and imports no torch."""

import hashlib
import json
import re
import shlex
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from seqmill.base.digests import sha256_but_for
from seqmill.base.files import sha256_of_file
from seqmill.base.input_files import DIGESTS, KnownDigests
from seqmill.base.locks import lock_holder
from seqmill.base.signals import is_alive
from seqmill.base.words import in_one_line, many, size_in_words
from seqmill.export.names import IDS, NAMES
from seqmill.run.doctor_shards import ExaminedShard, examine_shard, shard_findings
from seqmill.run.doctor_weights import missing_weights, other_downloads
from seqmill.run.findings import Finding, Remedy, guarded, shown, trouble_with, try_read
from seqmill.run.shard_state import is_at_work
from seqmill.run.stale import find_changed_inputs, started_world_size
from seqmill.run.walk import FoundRun, entries_of, exists, find_runs, last_error
from seqmill.spec.fingerprint import Fingerprint
from seqmill.spec.outputs import POOLINGS, dataset_name
from seqmill.spec.packing import packs_of_rank
from seqmill.store.embeddings import EmbeddingsFile
from seqmill.store.index import Index, open_index
from seqmill.store.index_format import WHY_INVALID
from seqmill.store.layout import SHARD_FILE
from seqmill.store.part_file import Part, open_part

EXPORTED = re.compile(rf"embeddings_\d+_({'|'.join(sorted(POOLINGS, key=len, reverse=True))})(?=\.|_pt$)")


@dataclass(frozen=True)
class Report:
    """The findings on a run; `root` is the working directory of its workflow."""

    name: str
    root: Path
    findings: list[Finding]

    @property
    def remedy(self) -> Remedy:
        return max((finding.remedy for finding in self.findings), default=Remedy.NOTHING)


def examine(results: Path, check: bool = False) -> list[Report]:
    """Examine the runs in `results/`, `results/DATASET/` or `results/DATASET/MODEL/`; never raises.

    With `check`, all bytes are read and compared with their digests.
    """
    runs = find_runs(results)
    others = other_downloads(results, runs)
    return [
        *(_report(run, check) for run in runs),
        *(Report(f"weights of {model}", root, [finding]) for root, model, finding in others),
    ]


def _report(run: FoundRun, check: bool) -> Report:
    if run.error:
        path = Path(run.error.filename or run.path)
        return Report(shown(run.path), run.path.parent, [trouble_with(path, run.error)])
    return Report(run.name, run.root, list(guarded(run.path, _examine(run, check))))


def _examine(run: FoundRun, check: bool) -> Iterator[Finding]:
    index, damage = try_read(run.index, _open_index, check) if run.index in run.files else (None, None)
    sizes = sorted(run.world_sizes())
    sets = {size: [examine_shard(run, rank, size, index, check) for rank in range(size)] for size in sizes}
    chosen = _chosen(run, sets)
    shards = sets.pop(chosen, [])
    merged = list(guarded(run.embeddings, _merged(run, index, shards, check)))
    is_sound = all(finding.remedy == Remedy.NOTHING for finding in merged)
    if index:
        yield Finding(f"index: {index.num_records} records, {index.num_sequences} sequences, {index.num_packs} packs")
        yield from guarded(run.index, _reused(index, is_needed=not is_sound))
    elif is_sound and not damage and not run.build_error():
        yield Finding("index: none; the merged results do not need it")
    else:
        yield damage or _not_made("index: not built", run.index_log)
    if is_sound and not any(shard.has_file or is_at_work(shard) for shard, _ in shards):
        yield Finding("shards: none; the merged results do not need them, but the next run would compute them again")
    else:
        yield from shard_findings(run, shards)
    for size, others in sets.items():
        done = sum(finding is None for _, finding in others)
        text = f"another set, of {many(size, 'shard')}: {done} complete; "
        text += f"the merge would use the set of {many(chosen, 'shard')}"
        is_reused = done and any(finding for _, finding in shards)
        yield Finding(text + (", whose workers take packs from it if the settings are the same" if is_reused else ""))
    yield from merged
    if not is_sound:
        yield from guarded(run.path, missing_weights(run))
    yield from guarded(run.path, _changed_inputs(run))
    if run.parts in run.files:
        yield from guarded(run.parts, _parts(run, index, shards, check))
    if run.exports in run.files and run.embeddings in run.files:
        yield from guarded(run.exports, _old_exports(run))
    yield from guarded(run.path, _left_over(run))


def _open_index(path: Path, check: bool) -> Index:
    index = open_index(path)
    for pack in range(index.num_packs if check else 0):
        index.pack_tokens(pack)  # raises if the checksum is wrong
    return index


def _open_part(path: Path, index: Index | None) -> Part:
    part = open_part(path)
    if index:
        for place in range(len(part.packs)):
            part.result(place, index)  # raises if the checksum is wrong
    return part


def _reused(index: Index, is_needed: bool) -> Iterator[Finding]:
    """Yield the earlier results that vectors are reused from, and those that are missing if the merge needs them."""
    for path, number in index.reused_counts():
        yield Finding(f"reused: {number} sequences from {path}")
        if is_needed and not exists(Path(path)):
            about = f"bring {path} back, or take it out of reuse and rm {shlex.quote(shown(index.path))}"
            yield Finding(f"reused: {path} is gone, and the merge needs it", Remedy.REPAIR, about)


def _chosen(run: FoundRun, sets: dict[int, list[ExaminedShard]]) -> int:
    """Return the number of shards that are being computed, else that a run would continue, else that were tried last.

    0 without shards.
    """
    for size, shards in sets.items():
        if any(finding and finding.remedy == Remedy.WAIT for _, finding in shards):
            return size
    begun, _ = try_read(run.path, started_world_size)
    return begun or [0, *run.world_sizes()][-1]


def _merged(run: FoundRun, index: Index | None, shards: list[ExaminedShard], check: bool) -> Iterator[Finding]:
    path = run.embeddings
    if path not in run.files:
        yield _not_made("embeddings.h5: not merged", None if any(finding for _, finding in shards) else run.merge_log)
        return
    embeddings = EmbeddingsFile(path)
    attributes, (rows, dimensions) = embeddings.attrs, embeddings.array.shape
    fates = {fate: number for fate, number in json.loads(attributes["fate_counts"]).items() if number}
    yield Finding(f"embeddings.h5: {rows} x {dimensions}; " + ", ".join(f"{fates[fate]} {fate}" for fate in fates))
    if index and attributes["index_digest"] != index.digest:
        yield Finding("embeddings.h5: made from another index than index.h5", Remedy.REMOVE, shown(path))
    if run.time_of(path) < max((run.time_of(shard.path) for shard, finding in shards if not finding), default=0):
        yield Finding("embeddings.h5: older than its shards; the next run merges them again", Remedy.RUN)
    yield from guarded(run.manifest, _by_manifest(run, embeddings, check))
    if number := attributes.get("num_invalid"):
        yield Finding(f"INVALID: {many(number, 'record')} left out, {WHY_INVALID}; see records.tsv.gz")
    if number := fates.get("quarantined"):
        yield Finding(f"QUARANTINED: {number} records have no finite embedding and were left out; see records.tsv.gz")
    if attributes["warning"]:
        yield Finding(str(attributes["warning"]))


def _by_manifest(run: FoundRun, embeddings: EmbeddingsFile, check: bool) -> Iterator[Finding]:
    """Yield how the merged files differ from the manifest, and the audit; raises if the manifest is damaged."""
    if missing := [path.name for path in (run.manifest, run.records) if path not in run.files]:
        yield Finding(f"missing next to embeddings.h5: {', '.join(missing)}", Remedy.RUN)
    if run.manifest.name in missing:
        return
    manifest = json.loads(run.manifest.read_text(encoding="utf-8"))
    merged, table = (manifest["outputs"][path.name] for path in (run.embeddings, run.records))
    told = (merged["rows"], merged["hidden_dim"], manifest["fingerprint"]["fingerprint"])
    same = told == (*embeddings.array.shape, embeddings.attrs["fingerprint"])
    if check and same:
        rest = sha256_but_for(embeddings.path, merged["data_offset"], merged["data_bytes"])
        values = hashlib.sha256(embeddings.array).hexdigest()
        same = (rest, values) == (merged["rest_sha256"], merged["embeddings_sha256"])
    if not same:
        yield Finding("embeddings.h5: not the file that manifest.json describes", Remedy.REMOVE, shown(embeddings.path))
    if check and not missing and sha256_of_file(run.records) != table["sha256"]:
        yield Finding("records.tsv.gz: not the file that manifest.json describes", Remedy.REMOVE, shown(run.records))
    if run.index not in run.files:
        for source in manifest["reuse"]:
            yield Finding(f"reused: {source['sequences']} sequences from {source['path']}")
    audit, audits = manifest["audit"], [shard["audit"] for shard in manifest["shards"]]
    if audit["audit_sequences"]:
        inexact = any(found.get("verdict") == "warn" and found["sequences"] for found in audits)
        verdict = "less exact than they should be" if inexact else "ok"
        worst = f"worst cosine {audit['audit_worst_cosine']:.6f} of {audit['audit_sequences']} sequences recomputed"
        yield Finding(f"audit: {worst}: {verdict}")
    else:
        reason = audits[0].get("reference", "none: it is off").removeprefix("none: ")
        yield Finding(f"audit: no sequence was recomputed: {reason}")


def _changed_inputs(run: FoundRun) -> Iterator[Finding]:
    for change in find_changed_inputs(run.path, run.root, KnownDigests(run.root / DIGESTS)):
        text = f"the input has changed: it was {change.before} and is {change.now} now; the next run computes it again"
        yield Finding(in_one_line(text), Remedy.RUN)


def _parts(run: FoundRun, index: Index | None, shards: list[ExaminedShard], check: bool) -> Iterator[Finding]:
    """Yield which packs are saved for the last computation, and the other part files."""
    files = entries_of(run.parts)
    parts, damaged = [], [path.name for path in files if path.suffix == ".damaged"]
    for path in sorted(files, key=lambda path: files[path].st_mtime):
        if path.name.endswith(".part.h5"):
            part, trouble = try_read(path, _open_part, index if check else None)
            if part:
                parts.append(part)
            elif trouble and exists(path):  # else its worker has just removed it
                damaged.append(path.name)
    if damaged:
        yield Finding(f"damaged part files, whose packs are computed again: {', '.join(sorted(damaged))}")
    if not parts or not index:
        return
    tried = [shard.status for shard, _ in shards if shard.status and shard.status.fingerprint]
    last = max(tried, key=lambda status: status.updated, default=None)
    known, _ = try_read(run.path, lambda _: Fingerprint.from_attributes(last.fingerprint) if last else None)
    current = known or parts[-1].fingerprint
    ours = [part for part in parts if not part.fingerprint.difference(current)]
    ranks = [rank for rank, (_, finding) in enumerate(shards) if finding]
    todo = {pack for rank in ranks for pack in packs_of_rank(index.num_packs, rank, len(shards))}
    saved = todo.intersection(pack for part in ours for pack in part.packs.tolist())
    if ours:
        size = sum(files[part.path].st_size for part in ours)
        yield Finding(packs_in_words(len(todo), len(saved), len(ours), size))
    if others := [part for part in parts if part not in ours]:
        size = sum(files[part.path].st_size for part in others)
        why, are = others[0].fingerprint.difference(current), "is" if len(others) == 1 else "are"
        text = f"{many(len(others), 'part file')} ({size_in_words(size)}) of another computation {are} not used: {why}"
        yield Finding(text)


def packs_in_words(todo: int, saved: int, num_files: int, num_bytes: int) -> str:
    """Say how many packs are still to do, and how many of these are saved in part files."""
    files = f"{many(num_files, 'part file')} ({size_in_words(num_bytes)})"
    if not todo:
        return f"packs: none still to do; {files} {'is' if num_files == 1 else 'are'} left over"
    if not saved:
        return f"packs: {todo} still to do; none of them is saved in {files}"
    are, need = ("is", "needs") if saved == 1 else ("are", "need")
    return f"packs: {todo} still to do; {saved} of them {are} saved in {files} and {need} no computing"


def _old_exports(run: FoundRun) -> Iterator[Finding]:
    """Yield the exports that are older than the results, or of an output that the results do not have."""
    outputs = EmbeddingsFile(run.embeddings).outputs
    known = {dataset_name(*pair, pair == outputs[0]) for pair in outputs}
    for path, entry in sorted(entries_of(run.exports).items()):
        if path.name.startswith(".") or path.name.endswith((IDS, NAMES)):
            continue
        output = EXPORTED.match(path.name)
        if output and output[0] not in known:
            yield Finding(f"{in_one_line(shown(path))}: embeddings.h5 has no output of this name any more; delete it")
        elif entry.st_mtime_ns < run.time_of(run.embeddings):
            yield Finding(f"{in_one_line(shown(path))}: made from an earlier result; delete it or export again")


def _left_over(run: FoundRun) -> Iterator[Finding]:
    """Yield the temporary files and locks that no process of this machine holds."""
    left = []
    for folder in (run.path, run.shards, run.parts):
        for path, entry in (entries_of(folder) if exists(folder) else {}).items():
            name = path.name
            host, _, process = name.removesuffix(".tmp").rpartition(".")
            is_local = host.endswith(f".{socket.gethostname()}")
            is_written = is_local and process.isdecimal() and is_alive(int(process))
            is_lock = SHARD_FILE.fullmatch(name) and name.endswith(".lock")
            is_free = is_lock and not lock_holder(folder / name[1:].removesuffix(".lock"))
            if name.startswith(".") and ((name.endswith(".tmp") and not is_written) or is_free):
                left.append((entry.st_size, shown(path)))
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        size = size_in_words(sum(size for size, _ in left))
        yield Finding(f"left over, safe to delete if no worker runs on another machine: {left[0][1]}{more} ({size})")


def _not_made(text: str, log: Path | None) -> Finding:
    """Return the finding on a missing file, with the error in the log of the program that should have written it."""
    if log and (error := last_error(log)):
        return Finding(f"{text}{error}\n    see {shown(log)}", Remedy.REPAIR, "fix what the error says")
    return Finding(text, Remedy.RUN)
