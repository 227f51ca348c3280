"""The embeddings of all shards and of earlier results, in the order of the FASTA."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from mmap import MADV_RANDOM, mmap
from pathlib import Path

import numpy as np

from seqmill.base.hdf5 import RowWriter
from seqmill.errors import SeqmillError
from seqmill.merge.verify import VerifiedSet

# The allocator returns blocks over 32 MB to the system, which clears them again each time: that took most of the time.
BLOCK_BYTES = 16 << 20

# Shards are sorted by length, the result in the order of the FASTA. So shards larger than memory are read one row at a
# time from random places, and a disk serves many such reads as fast as one.
READERS = 16


def gather_vectors(verified: VerifiedSet) -> Iterator[np.ndarray]:
    """Yield the rows of embeddings.h5 in blocks of bounded size, float32 (n, outputs x hidden_dim)."""
    shards, kept, width = verified.shards, verified.kept, verified.width
    shard_of_row, place_of_row = verified.locate()
    for shard in shards:
        if isinstance(memory_map := shard.embeddings.base, mmap):
            memory_map.madvise(MADV_RANDOM)  # no read-ahead: the next row asked for is elsewhere
    block_rows = max(BLOCK_BYTES // (4 * width), 1)

    def fill(block: np.ndarray, rows: np.ndarray, places: np.ndarray) -> None:
        """Fill these places of the block."""
        numbers = shard_of_row[rows[places]]
        for number in np.unique(numbers):
            wanted = places[numbers == number]
            if number < 0:
                block[wanted] = verified.reused.take(rows[wanted])
            else:
                block[wanted] = shards[number].embeddings[place_of_row[rows[wanted]]]

    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(kept), block_rows):
            rows = verified.index.record_rows[kept[start : start + block_rows]]
            block = np.empty((len(rows), width), np.float32)
            by_place = np.lexsort((place_of_row[rows], shard_of_row[rows]))
            for read in [readers.submit(fill, block, rows, part) for part in np.array_split(by_place, READERS)]:
                read.result()
            yield block


def write_outputs(
    path: Path, names: list[str], dtype: str, blocks: Iterable[np.ndarray], name_of: Callable[[int], str]
) -> dict[str, str]:
    """Write blocks of rows into reserved datasets. A thread writes each block while the next one is gathered.

    Args:
        path, names: the file, and the dataset of each output.
        dtype: float32 or float16.
        blocks: float32 (n, columns of all outputs side by side).
        name_of: returns the name of a row's record, for messages.

    Returns:
        The hexadecimal SHA-256 of the values in each dataset.

    Raises:
        SeqmillError: a value is beyond float16.
        OSError: a block could not be written, as on a full disk.
    """
    digests = {name: hashlib.sha256() for name in names}
    num_rows = 0
    with ExitStack() as held:
        writers = {name: held.enter_context(RowWriter(path, name, forget=True)) for name in names}
        thread = held.enter_context(ThreadPoolExecutor(1))

        def write(values: dict[str, np.ndarray]) -> None:
            for name, rows in values.items():
                writers[name].append(rows)
                digests[name].update(rows)

        previous = thread.submit(write, {})
        for block in blocks:
            with np.errstate(over="ignore"):
                outputs = [np.ascontiguousarray(rows, dtype) for rows in np.split(block, len(names), axis=1)]
            values = dict(zip(names, outputs, strict=True))
            if dtype == "float16":
                _require_finite(values, num_rows, name_of)
            num_rows += len(block)
            previous.result()
            previous = thread.submit(write, values)
        previous.result()
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _require_finite(values: dict[str, np.ndarray], first_row: int, name_of: Callable[[int], str]) -> None:
    for name, rows in values.items():
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            record = name_of(first_row + int(np.argmin(finite)))
            raise SeqmillError(f"{record}: a value of {name} is beyond float16 (65504): set dtype to float32")
