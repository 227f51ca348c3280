"""One rank's work: what parts have already, what is left to compute, the audit, the shard."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seqmill.base.files import refuse_to_replace, require_space, sha256_of_file
from seqmill.base.hdf5 import open_hdf5, read_attributes
from seqmill.base.input_files import note_file, require_unchanged
from seqmill.base.signals import Signals
from seqmill.embed import device as devices
from seqmill.embed.audit import Audit, audit_embeddings, judge
from seqmill.embed.compute import Computation, compute_packs, quarantined_message
from seqmill.embed.embedder import PackEmbedder, is_out_of_memory
from seqmill.embed.part_writer import PartWriter
from seqmill.embed.readout import Readout
from seqmill.embed.resume import Parts, add_finished_shards, find_parts
from seqmill.errors import SeqmillError
from seqmill.model.encoder import Encoder, make_encoder
from seqmill.model.weights import Weights, load_weights
from seqmill.spec.fingerprint import Fingerprint
from seqmill.spec.models import ModelSource, find_model
from seqmill.spec.outputs import Outputs
from seqmill.spec.packing import packs_of_rank, rows_of_rank
from seqmill.spec.task import AUTO, ShardTask
from seqmill.store.index import Index, embedded_lengths, open_index, residue_counts
from seqmill.store.layout import parts_folder
from seqmill.store.parts import remove_parts
from seqmill.store.reuse import require_computation
from seqmill.store.shards import new_shard
from seqmill.store.status import AuditFacts, RunFacts, ShardStatus, stage, write_status

UNTRAINED_WARNING = "UNTRAINED WEIGHTS: these embeddings are random projections and have no biological meaning"

log = logging.getLogger(__name__)


def embed_rank(task: ShardTask, status: ShardStatus, signals: Signals) -> Callable[[], None]:
    """Compute the rank's packs and write its shard; what was done is noted in `status`.

    Returns:
        What removes the parts, for when the status says that the shard is complete.

    Raises:
        SeqmillError: input that can't be used, too little disk or memory, embeddings that are not finite.
        Interrupted: a signal came.
    """
    if not 0 <= task.rank < task.world_size:
        raise SeqmillError(f"rank must be 0 to world size - 1; got rank {task.rank} of world size {task.world_size}")
    refuse_to_replace(task.index, task.shard)
    index = open_index(task.index)
    device = devices.choose_device(task.device)
    precision = devices.choose_precision(task.precision, device)
    threads = task.threads or torch.get_num_threads()
    packs = packs_of_rank(index.num_packs, task.rank, task.world_size)
    rows = rows_of_rank(index.pack_offsets, task.rank, task.world_size)
    status.num_sequences, status.num_packs = len(rows), len(packs)
    status.run = RunFacts(
        **devices.describe_device(device),
        precision=precision,
        precision_asked=task.precision,
        threads=threads,
        torch=str(torch.__version__),
        **_describe_packs(index, task, rows),
    )
    num_tokens = status.run.num_tokens
    log.info("rank %d of %d: %d sequences, %d tokens", task.rank, task.world_size, len(rows), num_tokens)
    log.info("device %s (%s), precision %s", device, status.run.device, precision)

    with stage(status, "load"):
        source = model_of(index, task.model)
        weights = _load_noted(source, status)
        architecture, dtype = weights.architecture, getattr(torch, precision)
        outputs = task.outputs.of(architecture.num_layers)
        width = len(outputs.pairs) * architecture.hidden_dim
        residue_dim = len(outputs.layers) * architecture.hidden_dim if outputs.per_residue else 0
        readout = Readout(source.family, outputs)
        try:
            model = make_encoder(weights, dtype, index.max_tokens, device, task.attention)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise SeqmillError(f"{source.name} in {precision} does not fit {_room(device)}") from error
            raise
        for file, noted in zip(source.files, status.weights or [], strict=True):
            require_unchanged(file, noted["stamp"])
        weights.tensors.clear()  # or a reduced-precision run would hold them twice
    status.run.num_layers = architecture.num_layers
    status.run.attention = model.attention
    status.run.elementwise = "Triton" if model.fuse else "eager"
    log.info("%s, attention %s, elementwise %s", source.name, model.attention, status.run.elementwise)
    if not weights.trained:
        status.warning = UNTRAINED_WARNING
        log.warning(UNTRAINED_WARNING)
    fingerprint = Fingerprint(
        index_digest=index.digest,
        model=source.name,
        model_digest=weights.digest,
        layers=",".join(map(str, outputs.layers)),
        pooling=",".join(outputs.poolings),
        precision=precision,
        per_residue=outputs.per_residue,
    )
    require_computation(index, fingerprint)
    status.fingerprint = fingerprint.attributes()
    write_status(task.status, status)

    with stage(status, "resume"):
        folder, with_quarantined = parts_folder(task.shard), task.on_error == "skip"
        parts = find_parts(folder, index, fingerprint, packs, with_quarantined)
        for place in (task.shard.parent, folder):
            add_finished_shards(parts, place, index, fingerprint, packs, with_quarantined)
        signals.check()
        todo = [pack for pack in packs if pack not in parts]
        status.resumed_packs = status.done_packs = len(packs) - len(todo)
        if status.resumed_packs:
            log.info("resuming: %d of %d packs are done", status.resumed_packs, len(packs))
        residue_bytes = np.dtype(outputs.per_residue).itemsize * residue_dim if residue_dim else 0
        _require_space(task, index, fingerprint, rows, todo, 4 * width, residue_bytes)

    with PartWriter(folder, task.shard.name, fingerprint, "", task.save_seconds, parts) as writer:
        embed = PackEmbedder(model, readout, lambda: _make_model(source, index, dtype, torch.device("cpu")))
        del model
        work = Computation(index, device, embed, lambda on: _make_model(source, index, torch.float32, on))
        compute_packs(work, todo, writer, task, status, signals)
    del embed, work  # room for the audit's reference
    status.run.computed_by = parts.computed_by(packs)
    quarantined = np.array(parts.quarantined(packs), np.int64)
    if len(quarantined):
        message = quarantined_message(index, quarantined, status)
        if task.on_error == "fail":
            raise SeqmillError(f"{message}; the other packs are saved: set on_error: skip to leave these out")
        log.warning("%s; left out, as on_error is skip", message)
    kept = rows[~np.isin(rows, quarantined)]
    audited = _audit(task, status, index, kept, parts, source, outputs, precision)
    attributes = {
        **fingerprint.attributes(),
        "rank": task.rank,
        "world_size": task.world_size,
        "num_layers": architecture.num_layers,
        "trained_weights": weights.trained,
        "warning": status.warning,
        "computed_by": "; ".join(status.run.computed_by),
        **audited,
    }
    with (
        stage(status, "write"),
        new_shard(task.shard, index, kept, quarantined, width, attributes, residue_dim) as shard,
    ):
        for result in parts.results(packs):
            shard.append(result.embeddings, result.residues)
            signals.check()
    with stage(status, "verify"):
        status.shard_sha256 = sha256_of_file(task.shard)
        status.shard_bytes = task.shard.stat().st_size
    status.run.update(**devices.peak_memory(device))
    log.info("complete: %d sequences, %.0f tokens/s", len(kept), status.run.tokens_per_second)
    return partial(remove_parts, folder, fingerprint, packs, own=task.shard.name)


def _describe_packs(index: Index, task: ShardTask, rows: np.ndarray) -> dict[str, Any]:
    num_tokens = int((index.token_offsets[rows + 1] - index.token_offsets[rows]).sum())
    pack_sizes = np.diff(index.token_offsets[index.pack_offsets])[task.rank :: task.world_size]
    # A sequence longer than pack_tokens fills a pack of its own.
    capacity = int(np.maximum(pack_sizes, index.attributes["pack_tokens"]).sum())
    return {
        "num_tokens": num_tokens,
        "num_residues": int(embedded_lengths(index, index.sequence_records[rows]).sum()),
        "pack_fill": round(num_tokens / capacity, 4) if capacity else 0.0,
    }


def _load_noted(source: ModelSource, status: ShardStatus) -> Weights:
    """Load the weights; meanwhile digest their files, and note them in the status."""
    with ThreadPoolExecutor(1) as thread:
        noting = thread.submit(lambda: [asdict(note_file(file)) for file in source.files])
        weights = load_weights(source)
        status.weights = noting.result()
    return weights


def _make_model(source: ModelSource, index: Index, dtype: torch.dtype, device: torch.device) -> Encoder:
    return make_encoder(load_weights(source), dtype, index.max_tokens, device, AUTO)


def _audit(
    task: ShardTask,
    status: ShardStatus,
    index: Index,
    rows: np.ndarray,
    parts: Parts,
    source: ModelSource,
    outputs: Outputs,
    precision: str,
) -> dict[str, Any]:
    """Recompute a few sequences by the reference; return what was found as attributes of the shard."""
    if not task.audit_seconds:
        return {"audit_sequences": 0, "audit_reference": "none: the audit is off"}
    with stage(status, "audit"):
        computed = status.seconds["compute"]
        limit = max(task.audit_seconds, 0.01 * computed)
        if not status.resumed_packs:  # a small shard should not take many times longer for its audit
            limit = min(limit, 1 + computed)
        try:
            audit = audit_embeddings(index, rows, parts.embedding, source, limit, outputs, parts.residues)
            verdict, message = judge(audit, precision, source.family)
        except (RuntimeError, MemoryError, ValueError) as error:  # a reference of another version, no memory
            message = f"it failed: {type(error).__name__}: {error}"
            audit = Audit(0, math.nan, math.nan, "", f"none: {message}", 0.0, False)
            verdict = "warn"
    numbers = (audit.worst_cosine, audit.worst_relative_error)
    cosine, error = (number if math.isfinite(number) else None for number in numbers)  # JSON has no NaN or infinity
    found = {**asdict(audit), "worst_cosine": cosine, "worst_relative_error": error}
    status.audit = AuditFacts(**found, verdict=verdict)
    log.log(logging.WARNING if verdict in ("warn", "fail") else logging.INFO, "audit: %s", message)
    names = ("sequences", "worst_cosine", "worst_relative_error", "reference")
    return {f"audit_{name}": getattr(audit, name) for name in names}


def _require_space(
    task: ShardTask,
    index: Index,
    fingerprint: Fingerprint,
    rows: np.ndarray,
    todo: list[int],
    row_bytes: int,
    residue_bytes: int,
) -> None:
    """Refuse to begin what the disk has no room for: this shard, and at the end all shards and the merge."""

    def bytes_of(num_rows: int, num_residues: int) -> int:
        return num_rows * row_bytes + num_residues * residue_bytes

    def residues_in(rows: np.ndarray) -> int:
        return int(residue_counts(index, rows).sum()) if residue_bytes else 0

    new_rows = np.concatenate([rows[:0], *(np.arange(*index.pack_offsets[pack : pack + 2]) for pack in todo)])
    both = bytes_of(len(rows) + len(new_rows), residues_in(rows) + residues_in(new_rows))
    require_space(task.shard.parent, both, "the shard and its part files")
    # First parts and shards lie side by side, later shards and what they are merged to.
    needed = bytes_of(index.num_computed + index.num_sequences, 2 * int(index.attributes["num_residues"]))
    if shutil.disk_usage(task.shard.parent).free < needed:  # only then, as it opens what may be thousands of files
        shards = task.shard.parent.glob(f"shard_*-of-{task.world_size}.h5")
        held = [*shards, *parts_folder(task.shard).glob("*.part.h5")]
        needed -= sum(_bytes_if_of(fingerprint, path) for path in held)
    require_space(task.shard.parent, needed, "all shards, and their parts or later the merged file,")


def _bytes_if_of(fingerprint: Fingerprint, path: Path) -> int:
    """Return the size of a shard or part; 0 if it is of another computation, damaged, or no longer there."""
    try:
        with open_hdf5(path, "file") as file:
            found = Fingerprint.from_attributes(read_attributes(file))
        return 0 if found.difference(fingerprint) else path.stat().st_size
    except (SeqmillError, OSError):  # another rank is done with it
        return 0


def _room(device: torch.device) -> str:
    if device.type == "cpu":
        return "the memory; use a machine with more, or a smaller model"
    free, total = torch.cuda.mem_get_info(device)
    return (
        f"{torch.cuda.get_device_name(device)}: {free / 1e9:.1f} of its {total / 1e9:.1f} GB are free; "
        "is another process on it? Else use precision bfloat16, a larger GPU or a smaller model"
    )


def model_of(index: Index, name: str) -> ModelSource:
    """Return the model of that name, empty for the index's own, once it is known to read the index's tokens.

    Raises:
        SeqmillError: no such model, one of another family, or with another tokenizer.
    """
    source = find_model(name or index.attributes["model"])
    made_for = f"{index.path}: made for {index.attributes['model']}"
    if source.family != index.attributes["family"]:
        raise SeqmillError(
            f"{made_for}, whose tokens are not those of {source.name}; build the index again for this model"
        )
    tokenizer = source.tokenizer
    if tokenizer and tokenizer.exists() and sha256_of_file(tokenizer) not in index.attributes["tokenizer"]:
        raise SeqmillError(f"{made_for}, by another tokenizer than {tokenizer}; build the index again for this model")
    return source
