"""The residues' vectors in embeddings.h5: those of every unique sequence once, in the order of the FASTA.

    residues         float16 or float32 (num_residues, hidden_dim); of further layers `residues_{layer}`
    residue_begins   int64 (num_rows,)   where the residues of each row of `embeddings` begin
    residue_counts   int32 (num_rows,)   how many they are

Records with the same sequence share their vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from seqmill.base.hdf5 import RowWriter, reserve_dataset
from seqmill.store.index import Index, residue_counts
from seqmill.store.shards import Shard

BLOCK_BYTES = 16 << 20  # beyond 32 MB the allocator gives it back each time, and the system clears it again
BLOCK_ROWS = 65536


@dataclass(frozen=True)
class ResidueLayout:
    """Where the vectors of residues lie in embeddings.h5.

    Attributes:
        rows: int64 (num_sequences,), index rows in the order in which they are written.
        counts: int64 (num_sequences,), residues of each.
        record_begins: int64 (num_kept,), where those of each record begin.
        record_counts: int32 (num_kept,).
    """

    rows: np.ndarray
    counts: np.ndarray
    record_begins: np.ndarray
    record_counts: np.ndarray

    @classmethod
    def of(cls, index: Index, kept: np.ndarray) -> ResidueLayout:
        """Lay out the residues of the records (int64, ascending) that have a row in embeddings.h5."""
        record_rows = index.record_rows[kept]
        rows = record_rows[index.sequence_records[record_rows] == kept]
        counts = residue_counts(index, rows)
        begins = np.empty(index.num_sequences, np.int64)
        begins[rows] = np.cumsum(counts) - counts
        return cls(rows, counts, begins[record_rows], residue_counts(index, record_rows).astype(np.int32))

    def reserve(self, file: h5py.File, names: list[str], hidden_dim: int, dtype: str) -> None:
        """Write the offsets, and create the datasets of vectors for `write_residues`."""
        file["residue_begins"] = self.record_begins
        file["residue_counts"] = self.record_counts
        for name in names:
            reserve_dataset(file, name, (int(self.counts.sum()), hidden_dim), dtype)


def write_residues(path: Path, layout: ResidueLayout, shards: list[Shard], names: list[str]) -> None:
    """Write the vectors of the shards' residues into the datasets `names`, a layer each, in blocks of bounded size."""
    with ExitStack() as stack:
        writers = [stack.enter_context(RowWriter(path, name, forget=True)) for name in names]
        for block in _gather(layout, shards):
            for writer, layer in zip(writers, np.split(block, len(names), axis=1), strict=True):
                writer.append(layer)


def _gather(layout: ResidueLayout, shards: list[Shard]) -> Iterator[np.ndarray]:
    """Yield the vectors of residues in order, all layers side by side."""
    num_sequences = int(layout.rows.max(initial=-1)) + 1
    shard_of_row = np.empty(num_sequences, np.int32)
    begin_of_row = np.empty(num_sequences, np.int64)
    for number, shard in enumerate(shards):
        rows = shard.index_rows
        shard_of_row[rows], begin_of_row[rows] = number, shard.residue_offsets[:-1]
    row_bytes = shards[0].residues.shape[1] * shards[0].residues.itemsize
    pieces: list[np.ndarray] = []
    waiting = 0
    spans = (shard_of_row[layout.rows], begin_of_row[layout.rows], layout.counts)
    for number, begin, count in _in_blocks(spans):
        pieces.append(shards[number].residues[begin : begin + count])
        waiting += count * row_bytes
        if waiting >= BLOCK_BYTES:
            yield np.concatenate(pieces)
            pieces, waiting = [], 0
    if pieces:
        yield np.concatenate(pieces)


def _in_blocks(columns: tuple[np.ndarray, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the rows of columns as Python's numbers, of which not all are made at once."""
    for start in range(0, len(columns[0]), BLOCK_ROWS):
        yield from zip(*(column[start : start + BLOCK_ROWS].tolist() for column in columns), strict=True)
