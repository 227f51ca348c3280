"""Saving finished packs as part files, while the computation goes on."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, count
from pathlib import Path

import numpy as np

from seqmill.base.files import whole_or_absent
from seqmill.base.hdf5 import new_hdf5, write_attributes
from seqmill.base.signals import Interrupted
from seqmill.embed.resume import Parts
from seqmill.spec.fingerprint import Fingerprint
from seqmill.store.part_file import PackResult, Part, open_part
from seqmill.store.parts import part_stem

MAX_PART_BYTES = 256 << 20  # of embeddings; what waits to be saved stays in memory

log = logging.getLogger(__name__)


class PartWriter:
    """Saves finished packs every `seconds`, in a thread of its own, so that the computation goes on meanwhile.

    On leaving the block, also by an error or a signal, what is finished is saved first. At most one part
    waits to be saved while another is filled.

    Args:
        folder: where the parts lie.
        name: of the shard that they are for.
        fingerprint: of the computation.
        computed_by: the device and the kernels, in words; may be changed while packs come.
        seconds: between two parts; 0 makes each pack a part.
        parts: told of each part that was saved.
    """

    def __init__(
        self, folder: Path, name: str, fingerprint: Fingerprint, computed_by: str, seconds: float, parts: Parts
    ) -> None:
        self._folder, self._name, self._fingerprint = folder, name, fingerprint
        self.computed_by = computed_by
        self._seconds, self._parts = seconds, parts
        self._pending: list[PackResult] = []
        self._pending_bytes = 0
        self._began = time.monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="part-writer")
        self._saving: Future[Part] | None = None

    def add(self, result: PackResult) -> None:
        """Take a finished pack; its arrays must not change afterwards.

        Raises:
            OSError: an earlier part could not be saved, as on a full disk.
        """
        self._pending.append(result)
        self._pending_bytes += result.nbytes
        if self._pending_bytes >= MAX_PART_BYTES or time.monotonic() - self._began >= self._seconds:
            self._save()

    def _save(self) -> None:
        self._finish()
        self._saving = self._thread.submit(self._write, self._pending, self.computed_by)
        self._pending, self._pending_bytes = [], 0
        self._began = time.monotonic()

    def _finish(self) -> None:
        """Wait for the part that is being saved."""
        if self._saving is not None:
            part = self._saving.result()
            self._parts.add(part, set(part.packs.tolist()))
            self._saving = None

    def _flush(self) -> None:
        self._finish()
        if self._pending:
            self._save()
            self._finish()

    def _write(self, group: list[PackResult], computed_by: str) -> Part:
        arrays = {
            "packs": np.array([result.pack for result in group], np.int64),
            "pack_ends": np.cumsum([len(result.index_rows) for result in group], dtype=np.int64),
            "quarantined_ends": np.cumsum([len(result.quarantined_rows) for result in group], dtype=np.int64),
            "residue_ends": np.cumsum([len(result.residues) for result in group], dtype=np.int64),
            "pack_digests": np.array([list(result.digest()) for result in group], np.uint8),
            "index_rows": np.concatenate([result.index_rows for result in group]),
            "embeddings": np.concatenate([result.embeddings for result in group]),
            "residues": np.concatenate([result.residues for result in group]),
            "quarantined_rows": np.concatenate([result.quarantined_rows for result in group]),
        }
        stem = part_stem(self._name, [result.pack for result in group])
        names = chain([f"{stem}.part.h5"], (f"{stem}_{number}.part.h5" for number in count(2)))
        path = next(path for name in names if not (path := self._folder / name).exists())
        with whole_or_absent(path) as temporary, new_hdf5(temporary) as file:
            write_attributes(file, {**self._fingerprint.attributes(), "computed_by": computed_by})
            for name, array in arrays.items():
                file.create_dataset(name, data=array, track_times=False)
        return open_part(path)

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            try:
                self._flush()
            except Interrupted:  # in this very moment; there is no second one
                self._flush()
                raise
        except Exception as error:
            if kind is None:
                raise
            log.error("the packs finished since the last part are lost: %s", error)  # the first error is the news
        finally:
            self._thread.shutdown()
