"""records.tsv.gz: one row and one fate for every input record."""

import gzip
from functools import lru_cache
from pathlib import Path
from threading import Event

import numpy as np

from seqmill.base.text_columns import split_texts, texts_end_to_end
from seqmill.store.index import Index, embedded_lengths
from seqmill.store.index_format import Fate

COLUMNS = (
    *("record", "id", "length", "embedded_length", "windows"),
    *("fate", "row", "same_as", "reason", "description"),
)
BLOCK = 65536
LEVEL = 4  # with headers like UniRef's, level 6 takes 1.8 times as long for a table 5 % smaller
SPECIAL = ('"', "\t", "\n", "\r")  # a field with one of them is quoted
INVALID = "invalid: a letter that is not allowed, or no sequence"
FATE_NAMES = {fate.value: fate.name.lower() for fate in Fate}


def write_records(path: Path, index: Index, fates: np.ndarray | None = None, unwanted: Event | None = None) -> None:
    """Write the table: tab-separated, quoted where needed, with a header line, compressed by gzip.

    Columns: `record` (1 for the first), `id`, `length` (residues or bases after cleaning; 0 if invalid),
    `embedded_length` (those that entered the model), `windows` (their number, 1 for a whole sequence), `fate`, `row`
    (in embeddings.h5, from 0; empty if rejected or quarantined), `same_as` (for a duplicate, the record that has the
    same sequence), `reason` (for a rejection, a truncation, windows or a quarantine; for a reused vector, its file),
    `description` (the rest of the header). `fates` are the final ones (uint8), by default those in the index. Once
    `unwanted` is set, writing stops.
    """
    fates = np.array(index.record_fates) if fates is None else fates
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


def has_row(fates: np.ndarray) -> np.ndarray:
    """Return which records have a row in embeddings.h5 (bool)."""
    return (fates != Fate.REJECTED) & (fates != Fate.QUARANTINED)


def _lines(index: Index, all_fates: np.ndarray, start: int, end: int, first_row: int) -> str:
    """Return the lines of the records start to end - 1; the first with a row has `first_row`."""
    block, fates = slice(start, end), all_fates[start:end]
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
        np.where(kept, rows.astype(object), ""),
        np.where(fates == Fate.DUPLICATE, firsts.astype(object), ""),
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
    """Return four fields and the tabs around them, cached because many records share them."""
    return f"\t{length}\t{embedded}\t{windows}\t{FATE_NAMES[fate]}\t"


def _reasons(index: Index, rows: np.ndarray, lengths: np.ndarray, fates: np.ndarray) -> np.ndarray:
    reasons = np.full(len(fates), "", object)
    if max_length := int(index.attributes["max_length"]):  # 0: no limit
        reasons[lengths > max_length] = f"longer than max_length={max_length}"
    reasons[lengths == 0] = INVALID
    reused, paths = np.flatnonzero(fates == Fate.REUSED), index.reused_paths
    files = index.reused_files[rows[reused] - index.num_computed]
    for place, number in zip(reused.tolist(), files.tolist(), strict=True):
        reasons[place] = _field("; ".join(filter(None, (f"from {paths[number]}", reasons[place]))))
    reasons[fates == Fate.QUARANTINED] = "its embedding is not finite, in float32 either"
    return reasons


def _texts(blob: np.ndarray, offsets: np.ndarray, start: int, end: int) -> list[str]:
    """Return the fields of a block of records, quoted where needed."""
    joined, bounds = texts_end_to_end(blob, offsets, np.arange(start, end))
    texts = split_texts(joined, bounds)
    if not any(letter.encode() in joined for letter in SPECIAL):
        return texts
    return [_field(text) for text in texts]


def _field(text: str) -> str:
    """Return a text as Python's csv module writes it: quoted where needed."""
    return '"' + text.replace('"', '""') + '"' if any(letter in text for letter in SPECIAL) else text


def _windows(index: Index, rows: np.ndarray) -> np.ndarray:
    """Return the number of windows of each row's sequence (int64); rejected records have the row -1."""
    if not index.has_segments:
        return np.ones(len(rows), np.int64)
    segments = index.sequence_segments[rows + 1] - index.sequence_segments[rows]
    # A window of only N is left out, perhaps on one strand only, because each strand is cut from its own end.
    return -(-segments // (2 if index.attributes["strand"] == "both" else 1))
