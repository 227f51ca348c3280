"""records.tsv.gz: one row and one fate for every input record."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from seqpack.index import Fate, Index

COLUMNS = ("record", "id", "length", "embedded_length", "fate", "row", "same_as", "reason", "description")
BLOCK = 65536


def write_records(path: Path, index: Index) -> None:
    """Write the table: tab-separated, quoted where needed, with a header line.

    Columns: `record` (1 for the first), `id`, `length` (residues after cleaning), `embedded_length`
    (residues that entered the model), `fate`, `row` (in embeddings.h5, from 0; empty if rejected),
    `same_as` (of a duplicate, the record whose sequence it has), `reason` (of a rejection or a
    truncation), `description` (the rest of the header).
    """
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as compressed,
        io.TextIOWrapper(compressed, encoding="utf-8", newline="") as text,
    ):
        writer = csv.writer(text, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        for start in range(0, index.num_records, BLOCK):
            writer.writerows(_rows(index, start, min(start + BLOCK, index.num_records)))


def _rows(index: Index, start: int, end: int) -> Iterator[tuple[object, ...]]:
    max_length = int(index.attributes["max_length"])
    row = int(np.count_nonzero(index.record_rows[:start] >= 0))
    fates = index.record_fates[start:end].tolist()
    lengths = index.record_lengths[start:end].tolist()
    sequences = index.record_rows[start:end].tolist()
    for record, fate, length, sequence in zip(range(start, end), fates, lengths, sequences, strict=True):
        reason = ""
        if length > max_length:
            reason = f"longer than max_length={max_length}"
        rejected = fate == Fate.REJECTED
        yield (
            record + 1,
            index.record_id(record),
            length,
            0 if rejected else min(length, max_length),
            Fate(fate).name.lower(),
            "" if rejected else row,
            int(index.sequence_records[sequence]) + 1 if fate == Fate.DUPLICATE else "",
            reason,
            index.record_description(record),
        )
        row += not rejected
