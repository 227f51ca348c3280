"""What state a folder of results is in. Reads only, does not stumble over what it finds, and imports no torch."""

from __future__ import annotations

import hashlib
import json
import shlex
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from seqmill.base.files import sha256_of_file
from seqmill.base.hdf5 import sha256_but_for
from seqmill.base.input_files import DIGESTS, KnownDigests
from seqmill.base.locks import lock_holder
from seqmill.base.words import in_one_line, size_in_words
from seqmill.run.doctor_shards import ShardState, is_at_work, shard_findings, shard_state
from seqmill.run.findings import (
    Finding,
    Mend,
    Stats,
    attempt,
    build_error,
    entries_of,
    exists,
    guarded,
    last_error,
    shown,
    trouble_with,
    unbuilt,
)
from seqmill.run.stale import find_changed_inputs, started_world_size
from seqmill.spec.fingerprint import Fingerprint
from seqmill.spec.packing import packs_of_rank
from seqmill.store.embeddings import Embeddings, open_embeddings
from seqmill.store.index import Index, open_index
from seqmill.store.layout import SHARD_FILE, logs_folder, root_of
from seqmill.store.part_file import Part, open_part

MARKS = {"index.h5", "embeddings.h5", "manifest.json", "records.tsv.gz"}


@dataclass(frozen=True)
class Report:
    """What was found of a dataset and a model; `root` is the working directory of its workflow."""

    name: str
    root: Path
    findings: list[Finding]

    @property
    def mend(self) -> Mend:
        return max((finding.mend for finding in self.findings), default=Mend.NOTHING)


def examine(results: Path, check: bool = False) -> list[Report]:
    """Return what is found in `results/`, `results/DATASET/` or `results/DATASET/MODEL/`; empty if nothing is.

    With `check` all bytes are read and held against their digests. It doesn't raise, whatever lies there.
    """
    # A link keeps its name: it tells the dataset.
    results = results.resolve() if ".." in results.parts else results.absolute()
    reports = list(_reports(results, 2, check))
    return reports + [_report(folder, {}, {}, check) for folder in unbuilt(results)]


def _reports(folder: Path, depth: int, check: bool) -> Iterator[Report]:
    """Look for folders of a dataset and a model, at most `depth` levels down."""
    try:
        names = entries_of(folder)
        files = entries_of(folder / "shards") if "shards" in names else {}
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        yield Report(shown(folder), folder.parent, [trouble_with(Path(error.filename or folder), error)])
        return
    if not MARKS.isdisjoint(names) or any(map(SHARD_FILE.fullmatch, files)) or exists(logs_folder(folder)):
        yield _report(folder, names, files, check)
    elif depth:
        for name in sorted(name for name in names if stat.S_ISDIR(names[name].st_mode)):
            yield from _reports(folder / name, depth - 1, check)


def _report(folder: Path, names: Stats, files: Stats, check: bool) -> Report:
    findings = list(guarded(folder, _examine(folder, names, files, check)))
    return Report(f"{folder.parent.name}/{folder.name}", root_of(folder), findings)


def _examine(folder: Path, names: Stats, files: Stats, check: bool) -> Iterator[Finding]:
    """Yield what is found in one folder; `names` are its entries, `files` those of its shards."""
    index, damage = attempt(folder / "index.h5", _open_index, check) if "index.h5" in names else (None, None)
    sizes = sorted({int(match["world_size"]) for name in files if (match := SHARD_FILE.fullmatch(name))})
    sets = {size: [shard_state(folder, rank, size, files, index, check) for rank in range(size)] for size in sizes}
    chosen = _chosen(folder, sets, files, index)
    shards = sets.pop(chosen, [])
    merged = list(guarded(folder / "embeddings.h5", _merged(folder, names, index, shards, check)))
    sound = all(finding.mend == Mend.NOTHING for finding in merged)
    if index:
        yield Finding(f"index: {index.num_records} records, {index.num_sequences} sequences, {index.num_packs} packs")
        yield from guarded(folder / "index.h5", _reused(index, needed=not sound))
    elif sound and not damage and not build_error(folder):
        yield Finding("index: none; the merged results do not need it")
    else:
        yield damage or _not_made("index: not built", logs_folder(folder) / "build_index.log")
    if sound and not any(state.path.name in files or is_at_work(state) for state in shards):
        yield Finding("shards: none; the merged results do not need them, but the next run would compute them again")
    else:
        yield from shard_findings(shards)
    for size, states in sets.items():
        done = sum(state.finding is None for state in states)
        said = f"another set of shards: {done} of {size} complete; the merge would use the set of {chosen}"
        taken = done and any(state.finding for state in shards)
        yield Finding(said + (", whose workers take packs from it if the settings are the same" if taken else ""))
    yield from merged
    yield from guarded(folder, _changed_inputs(folder))
    if "parts" in files:
        yield from guarded(folder / "shards/parts", _parts(folder / "shards/parts", index, shards, check))
    if "exports" in names and "embeddings.h5" in names:
        yield from guarded(folder / "exports", _old_exports(folder / "exports", names["embeddings.h5"].st_mtime_ns))
    yield from guarded(folder, _left_over(folder))


def _open_index(path: Path, check: bool) -> Index:
    index = open_index(path)
    for pack in range(index.num_packs if check else 0):
        index.pack_tokens(pack)  # raises if its checksum is another
    return index


def _open_part(path: Path, index: Index | None) -> Part:
    part = open_part(path)
    for place in range(len(part.packs) if index else 0):
        part.result(place, index)  # raises if its checksum is another
    return part


def _reused(index: Index, needed: bool) -> Iterator[Finding]:
    """Yield what is taken from earlier results, and which of them is not there, if the merge still needs it."""
    for path, number in index.reused_counts():
        yield Finding(f"reused: {number} sequences from {path}")
        if needed and not exists(Path(path)):
            about = f"bring {path} back, or take it out of reuse and rm {shlex.quote(shown(index.path))}"
            yield Finding(f"reused: {path} is gone, and the merge needs it", Mend.REPAIR, about)


def _chosen(folder: Path, sets: dict[int, list[ShardState]], files: Stats, index: Index | None) -> int:
    """Return the number of shards that are being computed, or that a run would go on with, or that were tried last."""
    for size, states in sets.items():
        if any(state.finding and state.finding.mend == Mend.WAIT for state in states):
            return size
    begun, _ = attempt(folder, started_world_size)
    last = {size: max(files[name].st_mtime for name in files if f"-of-{size}." in name) for size in sets}
    return begun or max(last, key=last.__getitem__, default=0)


def _merged(
    folder: Path, names: Stats, index: Index | None, shards: list[ShardState], check: bool
) -> Iterator[Finding]:
    path = folder / "embeddings.h5"
    if path.name not in names:
        log = logs_folder(folder) / "merge_shards.log"
        yield _not_made("embeddings.h5: not merged", None if any(state.finding for state in shards) else log)
        return
    embeddings = open_embeddings(path)
    attributes, (rows, dimensions) = embeddings.attrs, embeddings.array.shape
    fates = {fate: number for fate, number in json.loads(attributes["fate_counts"]).items() if number}
    yield Finding(f"embeddings.h5: {rows} x {dimensions}; " + ", ".join(f"{fates[fate]} {fate}" for fate in fates))
    if index and attributes["index_digest"] != index.digest:
        yield Finding("embeddings.h5: made from another index than index.h5", Mend.REMOVE, shown(path))
    newest = max((state.path.stat().st_mtime for state in shards if not state.finding), default=0.0)
    if names[path.name].st_mtime < newest:
        yield Finding("embeddings.h5: older than its shards, to be merged again", Mend.RUN)
    yield from guarded(folder / "manifest.json", _by_manifest(folder, names, embeddings, check))
    if number := fates.get("quarantined"):
        yield Finding(f"QUARANTINED: {number} records have no finite embedding and were left out; see records.tsv.gz")
    if attributes["warning"]:
        yield Finding(str(attributes["warning"]))


def _by_manifest(folder: Path, names: Stats, embeddings: Embeddings, check: bool) -> Iterator[Finding]:
    """Yield where the merged results are not what the manifest says, and the audit; raise if it can't be read."""
    if missing := [name for name in ("manifest.json", "records.tsv.gz") if name not in names]:
        yield Finding(f"missing beside embeddings.h5: {', '.join(missing)}", Mend.RUN)
    if "manifest.json" in missing:
        return
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    merged, table = (manifest["outputs"][name] for name in ("embeddings.h5", "records.tsv.gz"))
    said = (merged["rows"], merged["hidden_dim"], manifest["fingerprint"]["fingerprint"])
    same = said == (*embeddings.array.shape, embeddings.attrs["fingerprint"])
    if check and same:
        rest = sha256_but_for(embeddings.path, merged["data_offset"], merged["data_bytes"])
        values = hashlib.sha256(embeddings.array).hexdigest()
        same = (rest, values) == (merged["rest_sha256"], merged["embeddings_sha256"])
    if not same:
        yield Finding("embeddings.h5: not what manifest.json says of it", Mend.REMOVE, shown(embeddings.path))
    if check and not missing and sha256_of_file(folder / "records.tsv.gz") != table["sha256"]:
        about = shown(folder / "records.tsv.gz")
        yield Finding("records.tsv.gz: not what manifest.json says of it", Mend.REMOVE, about)
    if "index.h5" not in names:
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


def _changed_inputs(folder: Path) -> Iterator[Finding]:
    """Yield which input files are others now than those that the results were made from."""
    root = root_of(folder)
    for change in find_changed_inputs(folder, root, KnownDigests(root / DIGESTS)):
        text = f"the input has changed: it was {change.before} and is {change.now} now; the next run computes it again"
        yield Finding(in_one_line(text), Mend.RUN)


def _parts(folder: Path, index: Index | None, shards: list[ShardState], check: bool) -> Iterator[Finding]:
    """Yield which packs are saved for the computation that was tried last, and what else lies there."""
    files = entries_of(folder)
    parts, damaged = [], [name for name in files if name.endswith(".damaged")]
    for name in sorted(files, key=lambda name: files[name].st_mtime):
        if name.endswith(".part.h5"):
            part, trouble = attempt(folder / name, _open_part, index if check else None)
            if part:
                parts.append(part)
            elif trouble and exists(folder / name):  # or its worker has just removed it
                damaged.append(name)
    if damaged:
        yield Finding(f"damaged part files, whose packs are computed again: {', '.join(sorted(damaged))}")
    if not parts or not index:
        return
    tried = [state.status for state in shards if state.status and state.status.fingerprint]
    last = max(tried, key=lambda status: status.updated, default=None)
    known, _ = attempt(folder, lambda _: Fingerprint.from_attributes(last.fingerprint) if last else None)
    current = known or parts[-1].fingerprint
    ours = [part for part in parts if not part.fingerprint.difference(current)]
    ranks = [rank for rank, state in enumerate(shards) if state.finding]
    todo = {pack for rank in ranks for pack in packs_of_rank(index.num_packs, rank, len(shards))}
    saved = todo.intersection(pack for part in ours for pack in part.packs.tolist())
    size = size_in_words(sum(files[part.path.name].st_size for part in ours))
    if ours:
        yield Finding(f"saved: {len(saved)} of {len(todo)} packs still to do, in {len(ours)} part files ({size})")
    if others := [part for part in parts if part not in ours]:
        size = size_in_words(sum(files[part.path.name].st_size for part in others))
        why = others[0].fingerprint.difference(current)
        yield Finding(f"part files of other computations, not used: {len(others)} ({size}): {why}")


def _old_exports(folder: Path, merged: int) -> Iterator[Finding]:
    """Yield the exports that are older than the results, whose names do not tell: no one has asked for them since."""
    for name, entry in sorted(entries_of(folder).items()):
        if entry.st_mtime_ns < merged and not name.startswith("."):
            yield Finding(f"{in_one_line(shown(folder / name))}: of an earlier result; delete it or ask for it again")


def _left_over(folder: Path) -> Iterator[Finding]:
    """Yield the temporary files and locks that no process of this machine holds."""
    left = []
    for place in (folder, folder / "shards", folder / "shards/parts"):
        for name, entry in (entries_of(place) if exists(place) else {}).items():
            host, _, process = name.removesuffix(".tmp").rpartition(".")
            alive = host.endswith(f".{socket.gethostname()}") and exists(Path("/proc", process))
            lock = SHARD_FILE.fullmatch(name) and name.endswith(".lock")
            held = lock and lock_holder(place / name[1:].removesuffix(".lock"))
            if name.startswith(".") and ((name.endswith(".tmp") and not alive) or (lock and not held)):
                left.append((entry.st_size, shown(place / name)))
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        size = size_in_words(sum(size for size, _ in left))
        yield Finding(f"left over, to be deleted if no worker runs on another machine: {left[0][1]}{more} ({size})")


def _not_made(text: str, log: Path | None) -> Finding:
    """Return the finding of an absent file, with the error that ended the log of what should have made it."""
    if log and (said := last_error(log)):
        return Finding(f"{text}{said}\n    see {shown(log)}", Mend.REPAIR, "mend what the error says")
    return Finding(text, Mend.RUN)
