"""One rank's work: what parts have already, what is left to compute, the audit, the shard."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from seqpack import attention, devices, pooling
from seqpack.audit import audit_embeddings, judge
from seqpack.errors import SeqpackError
from seqpack.files import refuse_to_replace, require_space, sha256_of_file
from seqpack.fingerprint import Fingerprint
from seqpack.finite import FiniteResults
from seqpack.index import Index, open_index
from seqpack.interrupts import Signals
from seqpack.kernels import fused
from seqpack.memory import DoesNotFit, PackEmbedder
from seqpack.models.esm2 import ESM2
from seqpack.models.registry import Architecture, ModelSource, find_model
from seqpack.models.weights import load_weights
from seqpack.monitor import gemm_peak, model_flop, monitor
from seqpack.part_writer import PartWriter
from seqpack.parts import Parts, find_parts, parts_folder, remove_parts, remove_unfinished
from seqpack.plan import packs_of_rank, rows_of_rank
from seqpack.runner import embed_packs
from seqpack.shard import new_shard
from seqpack.status import ShardStatus, stage, write_status
from seqpack.task import ShardTask

UNTRAINED_WARNING = "UNTRAINED WEIGHTS: these embeddings are random projections and have no biological meaning"
PROGRESS_SECONDS = 30.0
MAX_QUARANTINED = 100  # with on_error=fail the search ends here: something is wrong with the weights
SHOWN_QUARANTINED = 10

log = logging.getLogger(__name__)


def embed_rank(task: ShardTask, status: ShardStatus, signals: Signals) -> None:
    """Compute the rank's packs and write its shard; what was done is noted in `status`.

    Raises:
        SeqpackError: input that can't be used, too little disk or memory, embeddings that are not finite.
        Interrupted: a signal came.
    """
    if not 0 <= task.rank < task.world_size:
        raise SeqpackError(f"rank must be 0 to world size - 1; got rank {task.rank} of world size {task.world_size}")
    refuse_to_replace(task.index, task.shard)
    index = open_index(task.index)
    device = devices.choose_device(task.device)
    precision = devices.choose_precision(task.precision, device)
    threads = task.threads or torch.get_num_threads()
    packs = packs_of_rank(index.num_packs, task.rank, task.world_size)
    rows = rows_of_rank(index.pack_offsets, task.rank, task.world_size)
    status.num_sequences, status.num_packs = len(rows), len(packs)
    status.run = {
        **devices.describe_device(device),
        "precision": precision,
        "threads": threads,
        "torch": torch.__version__,
        **_describe_packs(index, task, rows),
    }
    num_tokens = status.run["num_tokens"]
    log.info("rank %d of %d: %d sequences, %d tokens", task.rank, task.world_size, len(rows), num_tokens)
    log.info("device %s (%s), precision %s", device, status.run["device"], precision)

    with stage(status, "load"):
        source = find_model(task.model or index.attributes["model"])
        weights = load_weights(source)
        architecture, dtype = weights.architecture, getattr(torch, precision)
        kernel = attention.choose_kernel(device, dtype, architecture.head_dim, task.attention)
        fuse = fused.available(device)
        model = ESM2(architecture, weights.tensors, dtype, index.max_tokens, kernel, fuse).to(device)
        weights.tensors.clear()  # or a reduced-precision run would hold them twice
    status.run["attention"] = kernel
    status.run["elementwise"] = "triton" if fuse else "eager"
    computed_by = f"{status.run['device']}, attention {kernel}, elementwise {status.run['elementwise']}"
    log.info("%s, attention %s, elementwise %s", source.name, kernel, status.run["elementwise"])
    if not weights.trained:
        status.warning = UNTRAINED_WARNING
        log.warning(UNTRAINED_WARNING)
    fingerprint = Fingerprint(
        index_digest=index.digest,
        model=source.name,
        model_digest=weights.digest,
        layer=architecture.num_layers,
        pooling=pooling.MEAN_OVER_RESIDUES,
        precision=precision,
    )
    status.fingerprint = fingerprint.attributes()
    write_status(task.status, status)

    with stage(status, "resume"):
        folder, name = parts_folder(task.shard), f"rank_{task.rank}-of-{task.world_size}"
        remove_unfinished(folder, name)
        parts = find_parts(folder, index, fingerprint, packs, with_quarantined=task.on_error == "skip")
        todo = [pack for pack in packs if pack not in parts]
        status.resumed_packs = status.done_packs = len(packs) - len(todo)
        if status.resumed_packs:
            log.info("resuming: %d of %d packs are done", status.resumed_packs, len(packs))
        row_bytes = 4 * architecture.hidden_dim
        new_rows = sum(int(np.diff(index.pack_offsets[pack : pack + 2])[0]) for pack in todo)
        require_space(task.shard.parent, (len(rows) + new_rows) * row_bytes, "the shard and its part files")

    with PartWriter(folder, name, fingerprint, computed_by, task.save_seconds, parts) as writer:
        embed = PackEmbedder(model, lambda: _make_model(source, index, dtype, torch.device("cpu")))
        del model
        _compute(task, status, signals, index, source, embed, todo, device, writer)
    del embed
    status.run["computed_by"] = parts.computed_by(packs)
    quarantined = np.array(parts.quarantined(packs), np.int64)
    _judge_quarantined(task, status, index, quarantined)
    kept = rows[~np.isin(rows, quarantined)]
    audited = _audit(task, status, index, kept, parts, source, precision)
    attributes = {
        **fingerprint.attributes(),
        "rank": task.rank,
        "world_size": task.world_size,
        "trained_weights": weights.trained,
        "warning": status.warning,
        "computed_by": "; ".join(status.run["computed_by"]),
        **audited,
    }
    with (
        stage(status, "write"),
        new_shard(task.shard, index, kept, quarantined, architecture.hidden_dim, attributes) as shard,
    ):
        for result in parts.results(packs):
            shard.append(result.embeddings)
            signals.check()
    with stage(status, "verify"):
        status.shard_sha256 = sha256_of_file(task.shard)
        status.shard_bytes = task.shard.stat().st_size
    remove_parts(folder, fingerprint, packs)
    status.run.update(devices.peak_memory(device))
    log.info("complete: %d sequences, %.0f tokens/s", len(kept), status.run["tokens_per_second"])


def _describe_packs(index: Index, task: ShardTask, rows: np.ndarray) -> dict[str, Any]:
    num_tokens = int((index.token_offsets[rows + 1] - index.token_offsets[rows]).sum())
    pack_sizes = np.diff(index.token_offsets[index.pack_offsets])[task.rank :: task.world_size]
    # A sequence longer than pack_tokens fills a pack of its own.
    capacity = int(np.maximum(pack_sizes, index.attributes["pack_tokens"]).sum())
    return {
        "num_tokens": num_tokens,
        "num_residues": num_tokens - 2 * len(rows),
        "pack_fill": round(num_tokens / capacity, 4) if capacity else 0.0,
    }


def _make_model(source: ModelSource, index: Index, dtype: torch.dtype, device: torch.device) -> ESM2:
    weights = load_weights(source)
    kernel = attention.choose_kernel(device, dtype, weights.architecture.head_dim)
    fuse = fused.available(device)
    return ESM2(weights.architecture, weights.tensors, dtype, index.max_tokens, kernel, fuse).to(device)


def _compute(
    task: ShardTask,
    status: ShardStatus,
    signals: Signals,
    index: Index,
    source: ModelSource,
    embed: PackEmbedder,
    todo: list[int],
    device: torch.device,
    writer: PartWriter,
) -> None:
    """Compute the packs that are left, saving them as they come."""
    finite = FiniteResults(index, device, lambda on: _make_model(source, index, torch.float32, on))
    threads = status.run["threads"]
    # Sums are kept in float32 to their end, whatever the precision of the factors.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if device.type == "cuda" and todo:
        with stage(status, "warm_up"):  # the first pack again and for nothing: kernels are loaded and compiled
            list(embed_packs(embed, index, todo[:1], device, threads))
    num_quarantined = 0
    said = time.monotonic()
    with (
        stage(status, "compute"),
        monitor(device) as gpu,
        closing(embed_packs(embed, index, todo, device, threads)) as computed,
    ):
        try:
            for result in finite(computed):
                writer.add(result)
                status.done_packs += 1
                num_quarantined += len(result.quarantined_rows)
                if task.on_error == "fail" and num_quarantined >= MAX_QUARANTINED:
                    break
                if time.monotonic() - said >= PROGRESS_SECONDS:
                    said = time.monotonic()
                    log.info("%d of %d packs", status.done_packs, status.num_packs)
                    write_status(task.status, status)
                signals.check()
        except DoesNotFit as error:
            row = int(np.flatnonzero(np.diff(index.token_offsets) == error.num_tokens)[0])
            raise SeqpackError(
                f"{error}, that of {index.sequence_name(row)}; give the job more memory, or lower max_length"
            ) from error
        finally:
            status.run.update(
                out_of_memory_splits=embed.splits, sequences_on_cpu=embed.on_cpu, recomputed_float32=finite.recomputed
            )
    if num_quarantined >= MAX_QUARANTINED and task.on_error == "fail":
        raise SeqpackError(
            f"{num_quarantined} sequences have no finite embedding after {status.done_packs} of {status.num_packs} "
            f"packs, in float32 either, the first of them {_first_quarantined(index, result.quarantined_rows)}; "
            "check the weights, or set on_error: skip to leave such sequences out"
        )
    status.run.update(gpu.summary())
    status.run.update(_speed(index, todo, embed.architecture, status.seconds["compute"]))
    if device.type == "cuda" and todo:
        peak = gemm_peak(device, getattr(torch, status.run["precision"]))
        status.run["model_flop_utilization"] = round(status.run["model_flops_per_second"] / peak, 4)


def _speed(index: Index, packs: list[int], architecture: Architecture, seconds: float) -> dict[str, float]:
    """Return tokens and model FLOP a second, of real tokens."""
    lengths = np.concatenate([np.empty(0, np.int64), *(index.pack_lengths(pack) for pack in packs)])
    rate = 1 / seconds if seconds else 0.0
    return {
        "tokens_per_second": round(float(lengths.sum()) * rate, 1),
        "model_flops_per_second": round(model_flop(architecture, lengths) * rate),
    }


def _judge_quarantined(task: ShardTask, status: ShardStatus, index: Index, quarantined: np.ndarray) -> None:
    if not len(quarantined):
        return
    names = [index.sequence_name(row) for row in quarantined[:SHOWN_QUARANTINED].tolist()]
    status.quarantined = {"num_sequences": len(quarantined), "first": names}
    message = f"{len(quarantined)} sequences have no finite embedding, in float32 either: {', '.join(names)}"
    if len(names) < len(quarantined):
        message += " ..."
    if task.on_error == "fail":
        raise SeqpackError(f"{message}; the other packs are saved: set on_error: skip to leave these sequences out")
    log.warning("%s; left out, as on_error is skip", message)


def _first_quarantined(index: Index, rows: np.ndarray) -> str:
    return index.sequence_name(int(rows[0]))


def _audit(
    task: ShardTask,
    status: ShardStatus,
    index: Index,
    rows: np.ndarray,
    parts: Parts,
    source: ModelSource,
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
        audit = audit_embeddings(index, rows, parts.embedding, source, limit)
        verdict, message = judge(audit, precision) if audit.sequences else ("none", audit.reference)
    found = {name: value for name, value in asdict(audit).items() if value == value}  # JSON has no NaN
    status.audit = {**found, "verdict": verdict}
    (log.info if verdict == "ok" else log.warning)("audit: %s", message)
    names = ("sequences", "worst_cosine", "worst_relative_error", "reference")
    return {f"audit_{name}": getattr(audit, name) for name in names}
