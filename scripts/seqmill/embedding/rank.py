"""One rank's work, step by step: load, resume, compute, audit, write the shard."""

import logging
import math
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import numpy as np

from seqmill.base.files import require_space, sha256_of_file
from seqmill.base.signals import Signals
from seqmill.embedding.audit import StoredVectors, audit_embeddings, judge, not_audited
from seqmill.embedding.compute import compute_packs, quarantined_message
from seqmill.embedding.device import peak_memory
from seqmill.embedding.job import Job, load_job
from seqmill.embedding.part_writer import PartWriter
from seqmill.embedding.resume import DonePacks, add_finished_shards, find_parts
from seqmill.errors import SeqmillError
from seqmill.spec.task import ShardTask
from seqmill.store.index import residue_counts
from seqmill.store.shards import new_shard
from seqmill.store.status import ShardStatus, stage

log = logging.getLogger(__name__)


def embed_rank(task: ShardTask, status: ShardStatus, signals: Signals) -> Callable[[], None]:
    """Compute the rank's packs and write its shard; note the figures in `status`.

    Return a function that removes the parts, to be called when the status JSON says that the shard is complete. Raise a
    SeqmillError if the input can't be used, disk or memory are too small, or an embedding is not finite, and
    Interrupted after a signal.
    """
    job, embed = load_job(task, status)
    done = _find_done(job, signals)
    todo = [pack for pack in job.packs if pack not in done]
    with PartWriter(job.store, task.shard.name, task.save_seconds, done) as parts:
        compute_packs(job, embed, todo, parts, signals)
    del embed  # the audit needs the memory for its reference
    status.run.computed_by = done.computed_by(job.packs)
    quarantined = _quarantined(job, done)
    kept = job.rows[~np.isin(job.rows, quarantined)]
    attributes = {
        **job.fingerprint.attributes(),
        "rank": task.rank,
        "world_size": task.world_size,
        "num_layers": job.weights.architecture.num_layers,
        "trained_weights": job.weights.trained,
        "warning": status.warning,
        "computed_by": "; ".join(status.run.computed_by),
        **_audit(job, kept, done),
    }
    shard = new_shard(task.shard, job.index, kept, quarantined, job.width, attributes, job.residue_dim)
    with stage(status, "write"), shard as writer:
        for result in done.results(job.packs):
            writer.append(result.embeddings, result.residues)
            signals.check()
    with stage(status, "verify"):
        status.shard_sha256 = sha256_of_file(task.shard)
        status.shard_bytes = task.shard.stat().st_size
    status.run.update(**peak_memory(job.device))
    log.info("complete: %d sequences, %.0f tokens/s", len(kept), status.run.tokens_per_second)
    return partial(job.store.replace_by_shard, task.shard, task.status, job.packs)


def _find_done(job: Job, signals: Signals) -> DonePacks:
    """Find the packs that need not be computed, and make sure that the disk has room for the others."""
    store, status = job.store, job.status
    with stage(status, "resume"):
        with_quarantined = job.task.on_error == "skip"
        done = find_parts(store, job.packs, with_quarantined)
        for folder in (job.task.shard.parent, store.folder):
            add_finished_shards(done, store, folder, job.packs, with_quarantined)
        status.resumed_packs = status.done_packs = len(done)
        if status.resumed_packs:
            log.info("resuming: %d of %d packs are done", status.resumed_packs, len(job.packs))
        signals.check()  # HDF5 can lose the exception of a signal
        _require_space(job, [pack for pack in job.packs if pack not in done])
    return done


def _require_space(job: Job, todo: list[int]) -> None:
    """Raise a SeqmillError if the disk has too little room for this shard, or later for all shards and the merge."""
    index, folder = job.index, job.task.shard.parent
    row_bytes = 4 * job.width
    residue_bytes = np.dtype(job.outputs.per_residue).itemsize * job.residue_dim if job.residue_dim else 0
    new_rows = np.concatenate([job.rows[:0], *(np.arange(*index.pack_offsets[pack : pack + 2]) for pack in todo)])
    both = np.concatenate((job.rows, new_rows))
    num_residues = int(residue_counts(index, both).sum()) if residue_bytes else 0
    require_space(folder, len(both) * row_bytes + num_residues * residue_bytes, "the shard and its part files")
    # At first the disk holds parts and shards, later the shards and the merged file.
    num_rows, num_residues = index.num_computed + index.num_sequences, 2 * int(index.attributes["num_residues"])
    needed = num_rows * row_bytes + num_residues * residue_bytes
    if shutil.disk_usage(folder).free < needed:  # only then, because it may open thousands of files
        needed -= job.store.bytes_on_disk(folder.glob(f"shard_*-of-{job.task.world_size}.h5"))
    require_space(folder, needed, "all shards, and their parts or later the merged file,")


def _quarantined(job: Job, done: DonePacks) -> np.ndarray:
    """Return the index rows without a finite embedding, int64; raise a SeqmillError if there may be none."""
    quarantined = np.array(done.quarantined(job.packs), np.int64)
    if len(quarantined):
        message = quarantined_message(job.index, quarantined, job.status)
        if job.task.on_error == "fail":
            raise SeqmillError(f"{message}; the other packs are saved: set on_error: skip to leave these out")
        log.warning("%s; left out, as on_error is skip", message)
    return quarantined


def _audit(job: Job, rows: np.ndarray, done: DonePacks) -> dict[str, Any]:
    """Recompute a few sequences by the reference; return the findings as attributes of the shard."""
    task, status = job.task, job.status
    if not task.audit_seconds:
        return {"audit_sequences": 0, "audit_reference": "none: the audit is off"}
    with stage(status, "audit"):
        computed = status.seconds["compute"]
        limit = max(task.audit_seconds, 0.01 * computed)
        if not status.resumed_packs:  # the audit of a small shard should not take many times longer than the rest
            limit = min(limit, 1 + computed)
        try:
            stored = StoredVectors(job.index, job.outputs, done.embedding, done.residues)
            audit = audit_embeddings(stored, job.source, rows, limit)
            verdict, message = judge(audit, job.precision, job.source.family)
        except (RuntimeError, MemoryError, ValueError) as error:  # a reference of another version, no memory
            verdict, message = "warn", f"it failed: {type(error).__name__}: {error}"
            audit = not_audited(message)
    log.log(logging.WARNING if verdict in ("warn", "fail") else logging.INFO, "audit: %s", message)
    names = ("sequences", "worst_cosine", "worst_relative_error", "reference")
    numbers = (audit.worst_cosine, audit.worst_relative_error)
    cosine, error = (number if math.isfinite(number) else None for number in numbers)  # JSON has no NaN or infinity
    status.audit = msgspec.structs.replace(audit, worst_cosine=cosine, worst_relative_error=error, verdict=verdict)
    return {f"audit_{name}": getattr(audit, name) for name in names}
