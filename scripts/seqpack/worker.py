"""The worker: one rank's packs, from the index to a finished shard and its status JSON."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from seqpack.errors import SeqpackError
from seqpack.files import refuse_to_replace, sha256_of_file
from seqpack.lease import leased_gpu
from seqpack.status import COMPLETE, FAILED, RUNNING, ShardStatus, write_status

log = logging.getLogger(__name__)

UNTRAINED_WARNING = "UNTRAINED WEIGHTS: these embeddings are random projections and have no biological meaning"
PROGRESS_SECONDS = 30.0


class Interrupted(SystemExit):
    """A signal asked the worker to stop; the exit code is 128 + its number, as shells count."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.signal_name = signal.Signals(signal_number).name

    def __str__(self) -> str:
        return f"stopped by {self.signal_name}"


@dataclass(frozen=True)
class ShardTask:
    """What a worker is asked to do.

    Attributes:
        index: path of `index.h5`.
        model: a name or path (`seqpack.models.registry`); empty for the one the index was built for.
        rank, world_size: this shard among how many; 0 <= rank < world_size.
        shard, status: paths to write.
        device: auto, cpu or cuda.
        precision: auto, float32 or bfloat16.
        threads: CPU threads for the matrix products; 0 leaves it to torch.
        attempt: 1 for the first; recorded only.
    """

    index: Path
    rank: int
    world_size: int
    shard: Path
    status: Path
    model: str = ""
    device: str = "auto"
    precision: str = "auto"
    threads: int = 0
    attempt: int = 1


def embed_shard(task: ShardTask) -> ShardStatus:
    """Compute a shard; the status JSON says `complete` or `failed` before this returns or raises.

    Raises:
        SeqpackError: input that can't be used.
        Interrupted: SIGTERM, SIGINT or SIGHUP came.
    """
    status = ShardStatus(task.rank, task.world_size, RUNNING, str(task.shard), attempt=task.attempt, started=_now())
    signals = _Signals()
    try:
        signals.catch()
        write_status(task.status, status)
        with leased_gpu() if task.device != "cpu" else nullcontext():
            _compute(task, status, signals)
        status.status = COMPLETE
    except BaseException as error:
        status.status = FAILED
        status.error = {"type": type(error).__name__, "message": str(error)}
        raise
    finally:
        try:
            signals.ignore()
        except Interrupted:  # the first signal, after the work has ended: what it has come to stands
            signals.ignore()
        if status.status == RUNNING:  # the first signal, before the failure above was noted
            status.status, status.error = FAILED, {"type": "Interrupted", "message": "stopped by a signal"}
        status.ended = _now()
        write_status(task.status, status)
        signals.restore()
    return status


class _Signals:
    """Turns the signals that ask a process to stop into `Interrupted`, while it is wanted."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def catch(self) -> None:
        for number in self.NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, which is to be obeyed
                self._previous[number] = signal.signal(number, self._interrupt)

    def ignore(self) -> None:
        """Let a second signal not disturb the writing of the status."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise again what was received: an exception is lost that arises inside one of h5py's callbacks."""
        if self.received:
            raise Interrupted(self.received)

    def _interrupt(self, number: int, frame: object) -> None:
        if not self.received:  # a further one would only disturb what the first has set going
            self.received = number
            raise Interrupted(number)


def _compute(task: ShardTask, status: ShardStatus, signals: _Signals) -> None:
    if not 0 <= task.rank < task.world_size:
        raise SeqpackError(f"rank must be 0 to world size - 1; got rank {task.rank} of world size {task.world_size}")
    refuse_to_replace(task.index, task.shard)
    with _stage(status, "import"):
        import numpy as np
        import torch

        from seqpack import attention, devices, pooling
        from seqpack.fingerprint import Fingerprint
        from seqpack.index import open_index
        from seqpack.models.esm2 import ESM2
        from seqpack.models.registry import find_model
        from seqpack.models.weights import load_weights
        from seqpack.plan import packs_of_rank, rows_of_rank
        from seqpack.runner import embed_packs
        from seqpack.shard import new_shard

    threads = task.threads or torch.get_num_threads()
    index = open_index(task.index)
    device = devices.choose_device(task.device)
    precision = devices.choose_precision(task.precision, device)
    packs = packs_of_rank(index.num_packs, task.rank, task.world_size)
    rows = rows_of_rank(index.pack_offsets, task.rank, task.world_size)
    lengths = index.token_offsets[rows + 1] - index.token_offsets[rows]
    num_tokens = int(lengths.sum())
    pack_sizes = np.diff(index.token_offsets[index.pack_offsets])[task.rank :: task.world_size]
    # A sequence longer than pack_tokens fills a pack of its own.
    capacity = int(np.maximum(pack_sizes, index.attributes["pack_tokens"]).sum())
    status.num_sequences = len(rows)
    status.run = {
        **devices.describe_device(device),
        "precision": precision,
        "threads": threads,
        "torch": torch.__version__,
        "num_packs": len(packs),
        "num_tokens": num_tokens,
        "num_residues": num_tokens - 2 * len(rows),
        "pack_fill": round(num_tokens / capacity, 4) if capacity else 0.0,
    }
    log.info("rank %d of %d: %d sequences, %d tokens", task.rank, task.world_size, len(rows), num_tokens)
    log.info("device %s (%s), precision %s", device, status.run["device"], precision)

    with _stage(status, "load"):
        source = find_model(task.model or index.attributes["model"])
        weights = load_weights(source)
        architecture, dtype = weights.architecture, getattr(torch, precision)
        kernel = attention.choose_kernel(device, dtype, architecture.head_dim)
        model = ESM2(architecture, weights.tensors, dtype, index.max_tokens, kernel).to(device)
        weights.tensors.clear()  # or a reduced-precision run would hold them twice
    status.run["attention"] = kernel
    log.info("%s, attention %s", source.name, kernel)
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
    attributes = {
        **fingerprint.attributes(),
        "rank": task.rank,
        "world_size": task.world_size,
        "trained_weights": weights.trained,
        "warning": status.warning,
    }
    write_status(task.status, status)

    progress = _Progress(len(packs))
    with (
        _stage(status, "compute"),
        new_shard(task.shard, index, rows, architecture.hidden_dim, attributes) as writer,
    ):
        for embeddings in embed_packs(model, index, packs, device, threads):
            writer.append(embeddings)
            progress.done_one()
            signals.check()
    with _stage(status, "verify"):
        status.shard_sha256 = sha256_of_file(task.shard)
        status.shard_bytes = task.shard.stat().st_size
    compute = status.seconds["compute"]
    status.run["tokens_per_second"] = round(num_tokens / compute, 1) if compute else 0.0
    status.run.update(devices.peak_memory(device))
    log.info("complete: %d sequences, %.0f tokens/s", len(rows), status.run["tokens_per_second"])


class _Progress:
    """A log line now and then."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.said = total, 0, time.monotonic()

    def done_one(self) -> None:
        self.done += 1
        if time.monotonic() - self.said >= PROGRESS_SECONDS:
            self.said = time.monotonic()
            log.info("%d of %d packs", self.done, self.total)


@contextmanager
def _stage(status: ShardStatus, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    status.seconds[name] = round(time.perf_counter() - start, 3)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
