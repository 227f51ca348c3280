"""The computation of a rank's packs: warm-up, results saved as they come, figures, what is quarantined."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from seqmill.base.signals import Signals
from seqmill.embed.embedder import DoesNotFit, PackEmbedder
from seqmill.embed.finite import FiniteResults
from seqmill.embed.monitor import gemm_peak, monitor
from seqmill.embed.part_writer import PartWriter
from seqmill.embed.runner import embed_packs, warm_up
from seqmill.errors import SeqmillError
from seqmill.model.encoder import Encoder
from seqmill.spec.models import AnyArchitecture, model_flop
from seqmill.spec.task import ShardTask
from seqmill.store.index import Index
from seqmill.store.status import Quarantined, ShardStatus, Throughput, stage, write_status

PROGRESS_SECONDS = 10.0
# With on_error=fail the search ends after so many: something is wrong with the weights. With skip it ends after ten
# times as many if they are most of all.
MAX_QUARANTINED = 100
SHOWN_QUARANTINED = 10

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Computation:
    """What is needed to compute packs.

    Attributes:
        index: holds the tokens.
        device: where to compute.
        embed: the model on that device.
        exact_model: makes the model in float32 on a device.
    """

    index: Index
    device: torch.device
    embed: PackEmbedder
    exact_model: Callable[[torch.device], Encoder]


def compute_packs(
    work: Computation, packs: list[int], writer: PartWriter, task: ShardTask, status: ShardStatus, signals: Signals
) -> None:
    """Compute packs and hand what comes of them to the writer; note the figures in the status.

    Raises:
        SeqmillError: too little memory for a sequence; too many embeddings that are not finite.
        Interrupted: a signal came.
    """
    index, device, embed = work.index, work.device, work.embed
    finite = FiniteResults(index, device, embed.readout, work.exact_model)
    threads = status.run.threads
    # Sums are kept in float32 to their end, whatever the precision of the factors.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    sizes = np.diff(index.token_offsets[index.pack_offsets])
    resumed_tokens = status.run.num_tokens - int(sizes[np.array(packs, np.int64)].sum())
    num_sequences = num_tokens = 0
    try:
        if device.type == "cuda" and packs:
            with stage(status, "warm_up"):
                warm_up(embed, index, packs[0], device)
        with (
            stage(status, "compute"),
            monitor(device) as gpu,
            closing(embed_packs(embed, index, packs, device, threads)) as computed,
        ):
            throughput = Throughput()
            status.run.throughput = throughput.points
            began = said = time.monotonic()
            for result in finite(computed):
                writer.computed_by = _with_detours(status, embed, finite)
                writer.add(result)
                status.done_packs += 1
                num_tokens += int(sizes[result.pack])
                throughput.add(time.monotonic() - began, num_tokens)
                num_sequences += len(result.index_rows) + len(result.quarantined_rows)
                _require_few_quarantined(index, finite, num_sequences, task, status)
                if time.monotonic() - said >= PROGRESS_SECONDS:
                    said = time.monotonic()
                    log.info("%d of %d packs", status.done_packs, status.num_packs)
                    rate = round(num_tokens / (said - began), 1)
                    status.run.update(done_tokens=resumed_tokens + num_tokens, tokens_per_second=rate)
                    write_status(task.status, status)
                signals.check()
            throughput.add(time.monotonic() - began, num_tokens, is_last=True)
    except DoesNotFit as error:
        name = index.sequence_name(index.row_of_segment(error.segment))
        raise SeqmillError(f"{error}, that of {name}; give the job more memory, or lower max_length") from error
    finally:
        status.run.update(
            out_of_memory_splits=embed.splits, sequences_on_cpu=embed.on_cpu, recomputed_float32=finite.recomputed
        )
    status.run.update(**gpu.summary())
    status.run.update(**_speed(index, packs, embed.architecture, status.seconds["compute"]))
    if device.type == "cuda" and packs:
        try:
            peak = gemm_peak(device, getattr(torch, status.run.precision))
            status.run.model_flop_utilization = round(status.run.model_flops_per_second / peak, 4)
        except RuntimeError as error:  # as where the model leaves no room: a figure is worth less than the work
            log.warning("the GPU's peak can't be measured: %s", error)


def quarantined_message(index: Index, quarantined: np.ndarray, status: ShardStatus) -> str:
    """Say which sequences (index rows) have no finite embedding, and note it in the status."""
    names = [index.sequence_name(row) for row in quarantined[:SHOWN_QUARANTINED].tolist()]
    status.quarantined = Quarantined(len(quarantined), names)
    more = " ..." if len(names) < len(quarantined) else ""
    number = "1 sequence has" if len(quarantined) == 1 else f"{len(quarantined)} sequences have"
    return f"{number} no finite embedding, in float32 either: {', '.join(names)}{more}"


def _with_detours(status: ShardStatus, embed: PackEmbedder, finite: FiniteResults) -> str:
    """Return who computes, with what was left to the CPU or to float32 so far."""
    detours = [text for text, number in (("the CPU", embed.on_cpu), ("float32", finite.recomputed)) if number]
    suffix = f" (some sequences by {' and '.join(detours)})" if detours else ""
    return f"{status.run.device}, attention {status.run.attention}, {status.run.elementwise}{suffix}"


def _require_few_quarantined(
    index: Index, finite: FiniteResults, num_sequences: int, task: ShardTask, status: ShardStatus
) -> None:
    number = len(finite.quarantined)
    if number < MAX_QUARANTINED:
        return
    if task.on_error == "skip" and (number < 10 * MAX_QUARANTINED or number < num_sequences / 2):
        return
    advice = ", or set on_error: skip to leave such sequences out" if task.on_error == "fail" else ""
    message = quarantined_message(index, np.array(finite.quarantined), status)
    raise SeqmillError(
        f"{message}; that is after {status.done_packs} of {status.num_packs} packs: check the weights{advice}"
    )


def _speed(index: Index, packs: list[int], architecture: AnyArchitecture, seconds: float) -> dict[str, float]:
    """Return tokens and model FLOP a second, of real tokens."""
    lengths = np.concatenate([np.empty(0, np.int64), *(index.pack_lengths(pack) for pack in packs)])
    rate = 1 / seconds if seconds else 0.0
    return {
        "tokens_per_second": round(float(lengths.sum()) * rate, 1),
        "model_flops_per_second": round(model_flop(architecture, lengths) * rate),
    }
