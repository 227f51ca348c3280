"""The residue vectors in embeddings.h5: those of every unique sequence once, in the order of the FASTA.

    residues         float16 or float32 (num_residues, hidden_dim); `residues_{layer}` for further layers
    residue_begins   int64 (num_rows,)   where the residues of each row of `embeddings` begin
    residue_counts   int32 (num_rows,)   how many they are

Records with the same sequence share their vectors.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from seqmill.base.hdf5 import NewFile, RowWriter
from seqmill.merge.verify import VerifiedSet
from seqmill.store.index import residue_counts

BLOCK_BYTES = 16 << 20  # the allocator returns blocks over 32 MB to the system, which clears them again each time


def reserve_residues(file: NewFile, verified: VerifiedSet) -> None:
    """Write where each record's vectors are, and create their datasets for `write_residues`."""
    index, record_rows = verified.index, verified.index.record_rows[verified.kept]
    rows, counts = _stored_rows(verified)
    begins = np.empty(index.num_sequences, np.int64)
    begins[rows] = np.cumsum(counts) - counts
    file["residue_begins"] = begins[record_rows]
    file["residue_counts"] = residue_counts(index, record_rows).astype(np.int32)
    for name in verified.residue_datasets:
        file.reserve(name, (int(counts.sum()), verified.hidden_dim), verified.fingerprint.per_residue)


def write_residues(path: Path, verified: VerifiedSet) -> None:
    """Write the vectors, one dataset per layer, in blocks of bounded size."""
    with ExitStack() as stack:
        names = verified.residue_datasets
        writers = [stack.enter_context(RowWriter(path, name, forget=True)) for name in names]
        for block in _gather(verified):
            for writer, layer in zip(writers, np.split(block, len(names), axis=1), strict=True):
                writer.append(layer)


def _stored_rows(verified: VerifiedSet) -> tuple[np.ndarray, np.ndarray]:
    """Return the index rows in the order in which their vectors are stored, and the residues in each (int64)."""
    record_rows = verified.index.record_rows[verified.kept]
    rows = record_rows[verified.index.sequence_records[record_rows] == verified.kept]
    return rows, residue_counts(verified.index, rows)


def _gather(verified: VerifiedSet) -> Iterator[np.ndarray]:
    """Yield the vectors in order, all layers side by side."""
    shards, (rows, counts) = verified.shards, _stored_rows(verified)
    numbers, places = (values[rows] for values in verified.locate())
    begins = np.empty_like(places)
    for number, shard in enumerate(shards):
        begins[numbers == number] = shard.residue_offsets[places[numbers == number]]
    row_bytes = shards[0].residues.shape[1] * shards[0].residues.itemsize
    pieces: list[np.ndarray] = []
    waiting = 0
    for number, begin, count in zip(numbers, begins, counts, strict=True):
        pieces.append(shards[number].residues[begin : begin + count])
        waiting += count * row_bytes
        if waiting >= BLOCK_BYTES:
            yield np.concatenate(pieces)
            pieces, waiting = [], 0
    if pieces:
        yield np.concatenate(pieces)
