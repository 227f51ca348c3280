"""The embeddings of all shards, and those that are reused, in the order of the FASTA."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from mmap import MADV_RANDOM, mmap
from pathlib import Path

import numpy as np

from seqmill.base.hdf5 import RowWriter
from seqmill.errors import SeqmillError
from seqmill.merge.reused import ReusedVectors
from seqmill.store.index import Index
from seqmill.store.shards import Shard

# Blocks beyond 32 MB are given back to the system and cleared by it again each time: that took most of the time.
BLOCK_BYTES = 16 << 20

# Shards lie by length, the result in the order of the FASTA: of shards that are larger than memory a row is read at a
# time, from anywhere, and a disk serves many such reads as fast as one.
READERS = 16


def gather_vectors(index: Index, shards: list[Shard], reused: ReusedVectors, kept: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the embeddings of records, all outputs side by side, in blocks of bounded size.

    Args:
        index: of the shards.
        shards: all of a set, at least one.
        reused: the index's reused sequences.
        kept: int64, the records, in order.

    Returns:
        float32 (n, outputs x hidden_dim) each.
    """
    shard_of_row = np.full(index.num_sequences, -1, np.int32)
    place_of_row = np.zeros(index.num_sequences, np.int64)
    for number, shard in enumerate(shards):
        shard_of_row[shard.index_rows] = number
        place_of_row[shard.index_rows] = np.arange(len(shard.index_rows))
        if isinstance(memory_map := shard.embeddings.base, mmap):
            memory_map.madvise(MADV_RANDOM)  # the rows beside one are not those asked for next
    width = shards[0].embeddings.shape[1]
    block_rows = max(BLOCK_BYTES // (4 * width), 1)

    def fill(block: np.ndarray, rows: np.ndarray, places: np.ndarray) -> None:
        """Put what belongs at some places of the block there."""
        numbers = shard_of_row[rows[places]]
        for number in np.unique(numbers):
            wanted = places[numbers == number]
            if number < 0:
                block[wanted] = reused.take(rows[wanted])
            else:
                block[wanted] = shards[number].embeddings[place_of_row[rows[wanted]]]

    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(kept), block_rows):
            rows = index.record_rows[kept[start : start + block_rows]]
            block = np.empty((len(rows), width), np.float32)
            by_place = np.lexsort((place_of_row[rows], shard_of_row[rows]))
            for read in [readers.submit(fill, block, rows, part) for part in np.array_split(by_place, READERS)]:
                read.result()
            yield block


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
            SeqmillError: a value is beyond float16.
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
            raise SeqmillError(
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
