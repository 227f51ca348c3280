"""Saving finished packs as part files while the computation goes on, so that a crash loses a minute at most."""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor

from seqmill.base.signals import Interrupted
from seqmill.embedding.resume import DonePacks
from seqmill.store.part_file import PackResult, Part
from seqmill.store.parts import PartStore

MAX_PART_BYTES = 256 << 20  # of vectors, which wait in memory

log = logging.getLogger(__name__)


class PartWriter:
    """Saves finished packs every `seconds` (0 makes each pack a part), in a thread of its own; `done` gets each part.

    At the end of the block, also after an error or a signal, it saves the packs that are finished. At most one part
    waits to be saved while another is filled.
    """

    def __init__(self, store: PartStore, shard_name: str, seconds: float, done: DonePacks) -> None:
        self._store, self._shard_name, self._seconds, self._done = store, shard_name, seconds, done
        self._computed_by = ""
        self._pending: list[PackResult] = []
        self._pending_bytes = 0
        self._began = time.monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="part-writer")
        self._saving: Future[Part] | None = None

    def add(self, result: PackResult, computed_by: str) -> None:
        """Take a finished pack, whose arrays must not change afterwards, and who computed it, in words.

        Raise an OSError if an earlier part could not be saved, for example because the disk is full.
        """
        self._computed_by = computed_by
        self._pending.append(result)
        self._pending_bytes += result.nbytes
        if self._pending_bytes >= MAX_PART_BYTES or time.monotonic() - self._began >= self._seconds:
            self._save()

    def _save(self) -> None:
        self._finish()
        if self._pending:
            self._saving = self._thread.submit(self._store.save, self._shard_name, self._pending, self._computed_by)
            self._pending, self._pending_bytes, self._began = [], 0, time.monotonic()

    def _finish(self) -> None:
        """Wait for the part that is being saved."""
        if self._saving is not None:
            part = self._saving.result()
            self._done.add(part, set(part.packs.tolist()))
            self._saving = None

    def _flush(self) -> None:
        self._save()
        self._finish()

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            try:
                self._flush()
            except Interrupted:  # the signal came at this very moment; there is no second one
                self._flush()
                raise
        except Exception as error:
            if kind is None:
                raise
            log.error("the packs finished since the last part are lost: %s", error)  # the first error is raised
        finally:
            self._thread.shutdown()
