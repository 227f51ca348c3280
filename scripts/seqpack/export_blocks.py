"""An embeddings file in blocks of bounded size: vectors and ids, read as they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from seqpack.embeddings import Embeddings
from seqpack.errors import SeqpackError
from seqpack.hdf5 import open_hdf5

BLOCK_BYTES = 32 << 20
ID_BLOCK = 4096


@dataclass(frozen=True)
class Block:
    """Consecutive records: `start` is the row of the first, `vectors` (n, hidden_dim) in the file's dtype."""

    start: int
    ids: list[str]
    lengths: np.ndarray
    vectors: np.ndarray


def read_blocks(embeddings: Embeddings) -> Iterator[Block]:
    """Yield all records in the order of the file, `BLOCK_BYTES` of vectors at a time.

    Raises:
        SeqpackError: the file is truncated or damaged.
    """
    array = embeddings.array
    rows = max(BLOCK_BYTES // max(array.shape[1] * array.itemsize, 1), 1)
    with open_hdf5(embeddings.path, "embeddings file") as file:
        ids = file["sequence_ids"].asstr()
        for start in range(0, len(array), rows):
            end = min(start + rows, len(array))
            yield Block(
                start, ids[start:end].tolist(), embeddings.lengths[start:end], read_rows(embeddings, start, end)
            )


def read_rows(embeddings: Embeddings, start: int, end: int) -> np.ndarray:
    """Return the vectors of some rows, (end - start, hidden_dim) in the file's dtype.

    They are read, not mapped: the pages of a map that was read once count as the process's memory.
    """
    array = embeddings.array
    if not isinstance(array, np.memmap):  # a file without rows
        return array[start:end]
    width = array.shape[1]
    offset = array.offset + start * width * array.itemsize
    values = np.fromfile(embeddings.path, array.dtype, (end - start) * width, offset=offset)
    if len(values) != (end - start) * width:
        raise SeqpackError(f"{embeddings.path}: the file became shorter while it was read; merge the shards again")
    return values.reshape(end - start, width)


def read_ids(embeddings: Embeddings) -> Iterator[str]:
    """Yield all ids in the order of the file."""
    with open_hdf5(embeddings.path, "embeddings file") as file:
        ids = file["sequence_ids"].asstr()
        for start in range(0, len(embeddings), ID_BLOCK):
            yield from ids[start : start + ID_BLOCK]


def ids_of(embeddings: Embeddings, rows: np.ndarray) -> np.ndarray:
    """Return the ids (object) of some rows (int64, in any order), without those of all others."""
    distinct, places = np.unique(rows, return_inverse=True)
    found = np.empty(len(distinct), object)
    with open_hdf5(embeddings.path, "embeddings file") as file:
        ids = file["sequence_ids"].asstr()
        blocks = distinct // ID_BLOCK
        for block in np.unique(blocks).tolist():
            wanted = blocks == block
            found[wanted] = ids[block * ID_BLOCK : (block + 1) * ID_BLOCK][distinct[wanted] % ID_BLOCK]
    return found[places]
