"""The outputs' datasets of embeddings.h5, written and digested a block of rows at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from seqpack.errors import SeqpackError
from seqpack.hdf5 import RowWriter


class OutputWriter:
    """Writes blocks of rows, in a thread of its own while the next block is put together."""

    def __init__(
        self, thread: Executor, writers: dict[str, RowWriter], dtype: str, name_of: Callable[[int], str]
    ) -> None:
        self._thread, self._writers, self._dtype, self._name_of = thread, writers, dtype, name_of
        self._rows = 0
        self._digests = {name: hashlib.sha256() for name in writers}
        self._before: Future[None] | None = None

    def append(self, block: np.ndarray) -> None:
        """Write the next rows, float32 (n, columns of all outputs side by side); the block is not to change any more.

        Raises:
            SeqpackError: a value is beyond float16.
            OSError: the block before could not be written, as on a full disk.
        """
        outputs = np.split(block, len(self._writers), axis=1)
        values = {name: self._converted(name, output) for name, output in zip(self._writers, outputs, strict=True)}
        self._rows += len(block)
        self.wait()
        self._before = self._thread.submit(self._write, values)

    def wait(self) -> None:
        """Wait until the last block is written; raises as `append` does."""
        if self._before is not None:
            self._before.result()

    def sha256(self, name: str) -> str:
        """Return the hexadecimal SHA-256 of the bytes that were written of an output."""
        return self._digests[name].hexdigest()

    def _converted(self, name: str, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(values, self._dtype)
        if self._dtype == "float16" and not np.isfinite(values).all():
            row = self._rows + int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
            raise SeqpackError(
                f"{self._name_of(row)}: a value of {name} is beyond float16 (65504): set dtype to float32"
            )
        return values

    def _write(self, values: dict[str, np.ndarray]) -> None:
        for name, rows in values.items():
            self._writers[name].append(rows)
            self._digests[name].update(rows)


@contextmanager
def write_outputs(path: Path, names: list[str], dtype: str, name_of: Callable[[int], str]) -> Iterator[OutputWriter]:
    """Open a writer of the reserved datasets `names`, float32 or float16; all rows are written when the block ends.

    `name_of` names the record of a row, for messages.
    """
    with ExitStack() as stack:
        writers = {name: stack.enter_context(RowWriter(path, name, forget=True)) for name in names}
        with ThreadPoolExecutor(1) as thread:
            writer = OutputWriter(thread, writers, dtype, name_of)
            yield writer
            writer.wait()
