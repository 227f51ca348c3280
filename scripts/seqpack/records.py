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


NONE = np.empty(0, np.int64)


def write_records(path: Path, index: Index, quarantined: np.ndarray = NONE) -> None:
    """Write the table: tab-separated, quoted where needed, with a header line.

    `quarantined` are the index rows (int64) of sequences without a finite embedding.

    Columns: `record` (1 for the first), `id`, `length` (residues after cleaning), `embedded_length`
    (residues that entered the model), `fate`, `row` (in embeddings.h5, from 0; empty if rejected or
    quarantined), `same_as` (of a duplicate, the record whose sequence it has), `reason` (of a rejection, a
    truncation or a quarantine), `description` (the rest of the header).
    """
    fates = final_fates(index, quarantined)
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as compressed,
        io.TextIOWrapper(compressed, encoding="utf-8", newline="") as text,
    ):
        writer = csv.writer(text, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        for start in range(0, index.num_records, BLOCK):
            writer.writerows(_rows(index, fates, start, min(start + BLOCK, index.num_records)))


def final_fates(index: Index, quarantined: np.ndarray) -> np.ndarray:
    """Return every record's fate (uint8), once it is known which sequences (index rows) were quarantined."""
    fates = np.array(index.record_fates)
    fates[np.isin(index.record_rows, quarantined)] = Fate.QUARANTINED
    return fates


def has_row(fates: np.ndarray) -> np.ndarray:
    """Return which records have a row in embeddings.h5 (bool)."""
    return (fates != Fate.REJECTED) & (fates != Fate.QUARANTINED)


def _rows(index: Index, final: np.ndarray, start: int, end: int) -> Iterator[tuple[object, ...]]:
    max_length = int(index.attributes["max_length"])
    row = int(np.count_nonzero(has_row(final[:start])))
    fates = final[start:end].tolist()
    lengths = index.record_lengths[start:end].tolist()
    sequences = index.record_rows[start:end].tolist()
    for record, fate, length, sequence in zip(range(start, end), fates, lengths, sequences, strict=True):
        reason = ""
        if length > max_length:
            reason = f"longer than max_length={max_length}"
        if fate == Fate.QUARANTINED:
            reason = "its embedding is not finite, in float32 either"
        left_out = fate in (Fate.REJECTED, Fate.QUARANTINED)
        yield (
            record + 1,
            index.record_id(record),
            length,
            0 if left_out else min(length, max_length),
            Fate(fate).name.lower(),
            "" if left_out else row,
            int(index.sequence_records[sequence]) + 1 if fate == Fate.DUPLICATE else "",
            reason,
            index.record_description(record),
        )
        row += not left_out
