"""The worker: it locks its shard and its GPU, lets `rank` do the work, and writes the status JSON in any case."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from seqmill.base.files import refuse_shared
from seqmill.base.imports import importing_much
from seqmill.base.locks import locked_shard
from seqmill.base.signals import Interrupted, Signals
from seqmill.embedding.lease import leased_gpu
from seqmill.spec.task import ShardTask
from seqmill.store.parts import remove_unfinished
from seqmill.store.status import COMPLETE, FAILED, RUNNING, ShardStatus, StatusError, stage, write_status

log = logging.getLogger(__name__)


def embed_shard(task: ShardTask) -> ShardStatus:
    """Compute a shard; the status JSON says `complete` or `failed` before this returns or raises.

    If another worker holds the shard, the status JSON is not written, because it belongs to that worker.

    Raises:
        SeqmillError: the input can't be used; another worker holds the shard; the status JSON has the name of another
            file, so none is written.
        Interrupted: SIGTERM, SIGINT, SIGHUP or SIGUSR1 came; finished packs have been saved.
    """
    refuse_shared([task.status, task.shard])
    refuse_shared([task.status], _inputs(task))
    status = ShardStatus(task.rank, task.world_size, RUNNING, str(task.shard), attempt=task.attempt, started=_now())
    signals = Signals()
    signals.catch()
    try:
        # The GPU's lease ends last, because this process keeps memory on the GPU until it ends.
        with ExitStack() as lease, locked_shard(task.shard) as alone:
            if alone:
                remove_unfinished(task.shard)
            remove_parts = _embed_locked(task, status, signals, lease)
            try:
                remove_parts()
            except Exception as error:  # the shard is complete all the same
                log.warning("the parts of the finished shard stay until the merge: %s", error)
    finally:
        signals.restore()
    return status


def _embed_locked(task: ShardTask, status: ShardStatus, signals: Signals, lease: ExitStack) -> Callable[[], None]:
    try:
        write_status(task.status, status)
        refuse_shared([task.shard], _inputs(task))
        if task.settings.device != "cpu":
            lease.enter_context(leased_gpu())
        with stage(status, "import"), importing_much():
            from seqmill.embedding.rank import embed_rank  # only now: torch must not see the GPUs of other workers
        remove_parts = embed_rank(task, status, signals)
        signals.ignore()  # from here on the shard is complete
        status.status = COMPLETE
    except BaseException as error:
        status.status = FAILED
        status.error = StatusError(type(error).__name__, str(error))
        raise
    finally:
        try:
            signals.ignore()
        except Interrupted:  # the first signal came after the work had ended: it changes nothing
            signals.ignore()
        if status.status == RUNNING:  # the first signal came before the failure above was noted
            status.status, status.error = FAILED, StatusError("Interrupted", "stopped by a signal")
        status.ended = _now()
        try:
            write_status(task.status, status)
        except OSError as error:
            if status.status == COMPLETE:
                raise
            log.error("the status JSON can't be written: %s", error)  # the earlier error is raised
    return remove_parts


def _inputs(task: ShardTask) -> list[Path]:
    return [task.index, *([Path(task.model)] if task.model else [])]  # a model may be a file


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
