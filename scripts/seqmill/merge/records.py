"""records.tsv.gz: one row and one fate for every input record."""

from __future__ import annotations

import gzip
from functools import lru_cache
from pathlib import Path
from threading import Event

import numpy as np

from seqmill.base.text_columns import split_texts, texts_end_to_end
from seqmill.store.index import Index, embedded_lengths
from seqmill.store.index_format import Fate

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
# With headers like UniRef's level 6 takes 1.8 times as long, for a table 5 % smaller.
LEVEL = 4
SPECIAL = ('"', "\t", "\n", "\r")  # a field with one of them is quoted
FATE_NAMES = {fate.value: fate.name.lower() for fate in Fate}

NONE = np.empty(0, np.int64)


def write_records(path: Path, index: Index, quarantined: np.ndarray = NONE, unwanted: Event | None = None) -> None:
    """Write the table: tab-separated, quoted where needed, with a header line.

    `quarantined` are the index rows (int64) of sequences without a finite embedding. Once `unwanted` is set, the
    writing ends where it is.

    Columns: `record` (1 for the first), `id`, `length` (residues or bases after cleaning), `embedded_length`
    (those that entered the model), `windows` (in how many, 1 for a whole sequence), `fate`, `row` (in
    embeddings.h5, from 0; empty if rejected or quarantined), `same_as` (of a duplicate, the record whose sequence
    it has), `reason` (of a rejection, a truncation, windows, a quarantine; of a reused vector, where it is from),
    `description` (the rest of the header).
    """
    fates = final_fates(index, quarantined)
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=LEVEL, fileobj=raw, mtime=0) as compressed,
    ):
        compressed.write(("\t".join(COLUMNS) + "\n").encode())
        first_row = 0
        for start in range(0, index.num_records, BLOCK):
            if unwanted is not None and unwanted.is_set():
                return
            end = min(start + BLOCK, index.num_records)
            compressed.write(_lines(index, fates, start, end, first_row).encode())
            first_row += int(np.count_nonzero(has_row(fates[start:end])))


def final_fates(index: Index, quarantined: np.ndarray) -> np.ndarray:
    """Return every record's fate (uint8), once it is known which sequences (index rows) were quarantined."""
    fates = np.array(index.record_fates)
    fates[np.isin(index.record_rows, quarantined)] = Fate.QUARANTINED
    return fates


def has_row(fates: np.ndarray) -> np.ndarray:
    """Return which records have a row in embeddings.h5 (bool)."""
    return (fates != Fate.REJECTED) & (fates != Fate.QUARANTINED)


def _lines(index: Index, final: np.ndarray, start: int, end: int, first_row: int) -> str:
    """Return the lines of the records start to end - 1: `final` are all fates, `first_row` is the next row."""
    block, fates = slice(start, end), final[start:end]
    kept = has_row(fates)
    lengths = index.record_lengths[block]
    embedded = np.where(kept, embedded_lengths(index, np.arange(start, end)), 0)
    windows = np.where(kept, _windows(index, index.record_rows[block]), 0)
    rows = first_row + np.cumsum(kept) - 1
    firsts = index.sequence_records[index.record_rows[block]] + 1
    columns = (
        range(start + 1, end + 1),
        _texts(index.record_ids, index.record_id_offsets, start, end),
        map(_middle, lengths.tolist(), embedded.tolist(), windows.tolist(), fates.tolist()),
        _where(kept, rows),
        _where(fates == Fate.DUPLICATE, firsts),
        _reasons(index, index.record_rows[block], lengths, fates),
        _texts(index.record_descriptions, index.record_description_offsets, start, end),
    )
    return "".join(
        [
            f"{record}\t{id_}{middle}{row}\t{same_as}\t{reason}\t{description}\n"
            for record, id_, middle, row, same_as, reason, description in zip(*columns, strict=True)
        ]
    )


@lru_cache(1 << 16)
def _middle(length: int, embedded: int, windows: int, fate: int) -> str:
    """Return four fields, with the tabs around them; many records have them alike."""
    return f"\t{length}\t{embedded}\t{windows}\t{FATE_NAMES[fate]}\t"


def _where(wanted: np.ndarray, numbers: np.ndarray) -> list[int | str]:
    """Return the numbers where they are wanted, elsewhere empty texts."""
    values: list[int | str] = numbers.tolist()
    for place in np.flatnonzero(~wanted).tolist():
        values[place] = ""
    return values


def _reasons(index: Index, rows: np.ndarray, lengths: np.ndarray, fates: np.ndarray) -> list[str]:
    max_length = int(index.attributes["max_length"])  # 0 is no limit
    reasons = [""] * len(fates)
    if max_length:
        for place in np.flatnonzero(lengths > max_length).tolist():
            reasons[place] = f"longer than max_length={max_length}"
    sources = _sources(index, rows)
    for place in np.flatnonzero(fates == Fate.REUSED).tolist():
        reasons[place] = _field("; ".join(filter(None, (f"from {sources[place]}", reasons[place]))))
    for place in np.flatnonzero(fates == Fate.QUARANTINED).tolist():
        reasons[place] = "its embedding is not finite, in float32 either"
    return reasons


def _texts(blob: np.ndarray, offsets: np.ndarray, start: int, end: int) -> list[str]:
    """Return the fields of a block of records, quoted where needed."""
    joined, bounds = texts_end_to_end(blob, offsets, np.arange(start, end))
    texts = split_texts(joined, bounds)
    if not any(letter.encode() in joined for letter in SPECIAL):
        return texts
    return [_field(text) for text in texts]


def _field(text: str) -> str:
    """Return a text as Python's csv writes it: quoted where needed."""
    return '"' + text.replace('"', '""') + '"' if any(letter in text for letter in SPECIAL) else text


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
