"""Computing a rank's packs: warm-up, saving of results as they come, speed, quarantined sequences."""

import logging
import time
from contextlib import closing

import numpy as np
import torch

from seqmill.base.signals import Signals
from seqmill.embedding.device import dtype_of
from seqmill.embedding.embedder import DoesNotFit, PackEmbedder
from seqmill.embedding.finite import FiniteResults
from seqmill.embedding.job import Job
from seqmill.embedding.monitor import gemm_peak, gpu_use, monitor
from seqmill.embedding.part_writer import PartWriter
from seqmill.embedding.runner import embed_packs, warm_up
from seqmill.errors import SeqmillError
from seqmill.spec.architectures import Architecture, model_flop
from seqmill.store.index import Index
from seqmill.store.status import Quarantined, ShardStatus, Throughput, stage, write_status

PROGRESS_SECONDS = 10.0
# With on_error=fail the computation stops at this many: something is wrong with the weights. With skip it stops at ten
# times as many, if they are at least half of the sequences.
MAX_QUARANTINED = 100
SHOWN_QUARANTINED = 10

log = logging.getLogger(__name__)


def compute_packs(job: Job, embed: PackEmbedder, packs: list[int], parts: PartWriter, signals: Signals) -> None:
    """Compute packs and save their results as parts; note the figures in the status.

    Raise a SeqmillError if a sequence does not fit the memory or too many embeddings are not finite, and Interrupted
    after a signal.
    """
    index, device, status = job.index, job.device, job.status
    finite = FiniteResults(index, device, embed.readout, lambda on: job.make_model(on, torch.float32))
    assert status.run.num_tokens is not None
    assert status.run.threads is not None
    sizes = np.diff(index.token_offsets[index.pack_offsets])
    resumed_tokens = status.run.num_tokens - int(sizes[np.array(packs, np.int64)].sum())
    num_sequences = num_tokens = 0
    try:
        if device.type == "cuda" and packs:
            with stage(status, "warm_up"):
                warm_up(embed, index, packs[0], device)
        with (
            stage(status, "compute"),
            monitor(device) as samples,
            closing(embed_packs(embed, index, packs, device, status.run.threads)) as computed,
        ):
            throughput = Throughput()
            status.run.throughput = throughput.points
            began = said = time.monotonic()
            for result in finite(computed):
                parts.add(result, _computed_by(status, embed, finite))
                status.done_packs += 1
                num_tokens += int(sizes[result.pack])
                throughput.add(time.monotonic() - began, num_tokens)
                num_sequences += len(result.index_rows) + len(result.quarantined_rows)
                _require_few_quarantined(job, finite.quarantined, num_sequences)
                if time.monotonic() - said >= PROGRESS_SECONDS:
                    said = time.monotonic()
                    log.info("%d of %d packs", status.done_packs, status.num_packs)
                    rate = round(num_tokens / (said - began), 1)
                    status.run.update(done_tokens=resumed_tokens + num_tokens, tokens_per_second=rate)
                    write_status(job.task.status, status)
                signals.check()
            throughput.add(time.monotonic() - began, num_tokens, is_last=True)
    except DoesNotFit as error:
        name = index.sequence_name(index.row_of_segment(error.segment))
        raise SeqmillError(f"{error}: {name}; give the job more memory, or lower max_length") from error
    finally:
        status.run.update(out_of_memory_splits=embed.splits, sequences_on_cpu=embed.on_cpu)
        status.run.recomputed_float32 = finite.recomputed
    status.run.update(**gpu_use(samples))
    _note_speed(job, packs, embed.architecture)


def quarantined_message(index: Index, quarantined: np.ndarray, status: ShardStatus) -> str:
    """Return a message on the sequences (index rows) without a finite embedding; note them in the status."""
    names = [index.sequence_name(row) for row in quarantined[:SHOWN_QUARANTINED].tolist()]
    status.quarantined = Quarantined(len(quarantined), names)
    more = " ..." if len(names) < len(quarantined) else ""
    number = "1 sequence has" if len(quarantined) == 1 else f"{len(quarantined)} sequences have"
    return f"{number} no finite embedding, in float32 either: {', '.join(names)}{more}"


def _computed_by(status: ShardStatus, embed: PackEmbedder, finite: FiniteResults) -> str:
    """Return device and kernels in words, with what was computed elsewhere so far."""
    detours = [text for text, number in (("the CPU", embed.on_cpu), ("float32", finite.recomputed)) if number]
    suffix = f" (some sequences by {' and '.join(detours)})" if detours else ""
    return f"{status.run.device}, attention {status.run.attention}, {status.run.elementwise}{suffix}"


def _require_few_quarantined(job: Job, quarantined: list[int], num_sequences: int) -> None:
    status, skip = job.status, job.task.on_error == "skip"
    if len(quarantined) < MAX_QUARANTINED:
        return
    if skip and (len(quarantined) < 10 * MAX_QUARANTINED or len(quarantined) < num_sequences / 2):
        return
    advice = "" if skip else ", or set on_error: skip to leave such sequences out"
    message = quarantined_message(job.index, np.array(quarantined), status)
    raise SeqmillError(
        f"{message}; that is after {status.done_packs} of {status.num_packs} packs: check the weights{advice}"
    )


def _note_speed(job: Job, packs: list[int], architecture: Architecture) -> None:
    """Note tokens and model FLOP per second in the status, and on a GPU the share of its peak."""
    status, device = job.status, job.device
    lengths = np.concatenate([np.empty(0, np.int64), *(job.index.pack_lengths(pack) for pack in packs)])
    seconds = status.seconds["compute"]
    rate = 1 / seconds if seconds else 0.0
    status.run.tokens_per_second = round(float(lengths.sum()) * rate, 1)
    status.run.model_flops_per_second = round(model_flop(architecture, lengths) * rate)
    if device.type == "cuda" and packs:
        try:
            peak = gemm_peak(device, dtype_of(job.precision))
            status.run.model_flop_utilization = round(status.run.model_flops_per_second / peak, 4)
        except RuntimeError as error:  # for example when the model leaves no memory for it
            log.warning("the GPU's peak can't be measured: %s", error)
