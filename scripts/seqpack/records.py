"""records.tsv.gz: one row and one fate for every input record."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from seqpack.index import Fate, Index, embedded_lengths

COLUMNS = (
    "record",
    "id",
    "length",
    "embedded_length",
    "windows",
    "fate",
    "row",
    "same_as",
    "reason",
    "description",
)
BLOCK = 65536
FATE_NAMES = {fate.value: fate.name.lower() for fate in Fate}

NONE = np.empty(0, np.int64)


def write_records(path: Path, index: Index, quarantined: np.ndarray = NONE) -> None:
    """Write the table: tab-separated, quoted where needed, with a header line.

    `quarantined` are the index rows (int64) of sequences without a finite embedding.

    Columns: `record` (1 for the first), `id`, `length` (residues or bases after cleaning), `embedded_length`
    (those that entered the model), `windows` (in how many, 1 for a whole sequence), `fate`, `row` (in
    embeddings.h5, from 0; empty if rejected or quarantined), `same_as` (of a duplicate, the record whose sequence
    it has), `reason` (of a rejection, a truncation, windows, a quarantine; of a reused vector, where it is from),
    `description` (the rest of the header).
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
    max_length = int(index.attributes["max_length"])  # 0 is no limit
    row = int(np.count_nonzero(has_row(final[:start])))
    fates = final[start:end].tolist()
    lengths = index.record_lengths[start:end].tolist()
    embedded = embedded_lengths(index, np.arange(start, end)).tolist()
    windows = _windows(index, index.record_rows[start:end]).tolist()
    same_as = (index.sequence_records[index.record_rows[start:end]] + 1).tolist()
    sources = _sources(index, index.record_rows[start:end])
    records = np.arange(start, end)
    ids, descriptions = index.ids_of(records), index.descriptions_of(records)
    for place, (fate, length) in enumerate(zip(fates, lengths, strict=True)):
        reason = ""
        if 0 < max_length < length:
            reason = f"longer than max_length={max_length}"
        if fate == Fate.REUSED:
            reason = "; ".join(filter(None, (f"from {sources[place]}", reason)))
        if fate == Fate.QUARANTINED:
            reason = "its embedding is not finite, in float32 either"
        left_out = fate in (Fate.REJECTED, Fate.QUARANTINED)
        yield (
            start + place + 1,
            ids[place],
            length,
            0 if left_out else embedded[place],
            0 if left_out else windows[place],
            FATE_NAMES[fate],
            "" if left_out else row,
            same_as[place] if fate == Fate.DUPLICATE else "",
            reason,
            descriptions[place],
        )
        row += not left_out


def _sources(index: Index, rows: np.ndarray) -> list[str]:
    """Return the path of the file that each row's vector is taken from; "" if it is computed. Rows may be -1."""
    paths = [*index.reused_paths, ""]
    files = np.full(len(rows), -1)
    is_reused = rows >= index.num_computed
    files[is_reused] = index.reused_files[rows[is_reused] - index.num_computed]
    return [paths[number] for number in files.tolist()]


def _windows(index: Index, rows: np.ndarray) -> np.ndarray:
    """Return in how many windows each row's sequence is embedded (int64); rows may be -1, of rejected records."""
    if not index.has_segments:
        return np.ones(len(rows), np.int64)
    segments = index.sequence_segments[rows + 1] - index.sequence_segments[rows]
    # A window of nothing but N is left out, perhaps on one strand only, as both begin at their own ends.
    return -(-segments // (2 if index.attributes["strand"] == "both" else 1))
