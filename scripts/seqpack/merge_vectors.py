"""The embeddings of all shards, and those that are reused, in the order of the FASTA."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from mmap import MADV_RANDOM, mmap

import numpy as np

from seqpack.index import Index
from seqpack.reused_vectors import ReusedVectors
from seqpack.shard import Shard

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
