"""What the report's maps are colored by: the length, and a column of a table of the user's."""

from __future__ import annotations

import base64
import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from seqpack.embeddings import Embeddings
from seqpack.errors import SeqpackError
from seqpack.report_map import ids_of

MISSING = ("", "NA")
MAX_CATEGORIES = 10  # with a color of their own, as map.js has them
SHOWN_UNKNOWN = 5
SHOWN_LABEL = 40  # characters
CHECKED_ROWS = 65536


def length_scale(embeddings: Embeddings, rows: np.ndarray, unit: str) -> dict[str, Any]:
    """Return the scale of the rows' lengths, logarithmic; see `_number_scale`."""
    return _number_scale(f"Length ({unit})", embeddings.lengths[rows].astype(np.float64), is_log=True)


def column_scale(
    path: Path, column: str, embeddings: Embeddings, rows: np.ndarray, left_out: set[str]
) -> dict[str, Any]:
    """Return the scale of a column of a table: of numbers, or of categories.

    Categories are all that is not numbers, and whole numbers of up to MAX_CATEGORIES kinds, as of clusters. Nothing
    and NA are no value; a record that the table does not name has none either.

    Args:
        path: tab-separated, with a header line and the ids in its first column.
        column: by name.
        embeddings: the file whose records the table is about.
        rows: int64, increasing, the rows shown.
        left_out: ids of records that have no embedding, which the table may name as well.

    Raises:
        SeqpackError: no such table or column; an id twice, or one that no record has.
    """
    values = _read_column(path, column)
    _require_known(path, values, embeddings, left_out)
    texts = [values.get(id_, "") for id_ in ids_of(embeddings, rows)]
    return _number_scale(column, numbers) if (numbers := _as_numbers(texts)) is not None else _categories(column, texts)


def _read_column(path: Path, column: str) -> dict[str, str]:
    values: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter="\t")
            header = next(lines, [])
            if column not in header[1:]:
                there = ", ".join(header[1:]) or "none"
                raise SeqpackError(f"{path}: has no column {column!r} beside its ids; there are: {there}")
            place = header.index(column, 1)
            for fields in lines:
                if not fields:
                    continue
                if len(fields) <= place:
                    raise SeqpackError(f"{path}, line {lines.line_num}: {len(fields)} fields, no {column!r} among them")
                if fields[0] in values:
                    raise SeqpackError(f"{path}, line {lines.line_num}: the id {fields[0]!r} stands there twice")
                values[fields[0]] = fields[place].strip()
    except FileNotFoundError:
        raise SeqpackError(f"{path}: no such table") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise SeqpackError(f"{path}: not a tab-separated table in UTF-8: {error}") from error
    return values


def _require_known(path: Path, values: dict[str, str], embeddings: Embeddings, left_out: set[str]) -> None:
    unknown = values.keys() - left_out
    for start in range(0, len(embeddings), CHECKED_ROWS):
        rows = np.arange(start, min(start + CHECKED_ROWS, len(embeddings)))
        unknown.difference_update(ids_of(embeddings, rows))
    if unknown:
        first = [id_ for id_ in values if id_ in unknown][:SHOWN_UNKNOWN]
        more = f" and {len(unknown) - len(first):,} more" if len(unknown) > len(first) else ""
        raise SeqpackError(
            f"{path}: no record of {embeddings.path} has the id {', '.join(map(repr, first))}{more}; the first column "
            "must hold ids as they stand in records.tsv.gz"
        )


def _as_numbers(texts: list[str]) -> np.ndarray | None:
    """Return texts as float64, missing ones as nan; None if they are names: of categories."""
    try:
        numbers = np.array([np.nan if text in MISSING else float(text) for text in texts])
    except ValueError:
        return None
    there = numbers[~np.isnan(numbers)]
    if not np.isfinite(there).all() or not len(there):
        return None
    is_whole = bool((there % 1 == 0).all())
    return None if is_whole and len(np.unique(there)) <= MAX_CATEGORIES else numbers


def _number_scale(name: str, numbers: np.ndarray, is_log: bool = False) -> dict[str, Any]:
    """Return a scale of numbers (float64, nan is none).

    `codes` are uint8 in base64, one a row shown: 0 is none, 1 the lowest value, 255 the highest.
    """
    there = ~np.isnan(numbers)
    low, high = float(numbers[there].min(initial=np.inf)), float(numbers[there].max(initial=-np.inf))
    if not there.any():
        low = high = 1.0
    values, ends = (np.log(numbers), np.log([low, high])) if is_log else (numbers, np.array([low, high]))
    shares = (values - ends[0]) / (ends[1] - ends[0] if high > low else 1)
    codes = np.where(there, 1 + np.round(254 * np.nan_to_num(shares)), 0)
    return {"name": name, "kind": "numbers", "low": low, "high": high, "log": is_log, "codes": _bytes(codes)}


def _categories(name: str, texts: list[str]) -> dict[str, Any]:
    """Return a scale of categories, the most frequent first.

    `codes` are uint8 in base64, one a row shown: 0 is none, k the k-th of `labels` (text and number of rows), of which
    a last one beyond MAX_CATEGORIES stands for all others.
    """
    counts = Counter(text for text in texts if text not in MISSING)
    ordered = sorted(counts, key=lambda text: (-counts[text], text))
    kept, others = ordered[:MAX_CATEGORIES], ordered[MAX_CATEGORIES:]
    codes = {text: number for number, text in enumerate(kept, 1)} | dict.fromkeys(others, MAX_CATEGORIES + 1)
    labels = [[text if len(text) <= SHOWN_LABEL else text[:SHOWN_LABEL] + "…", counts[text]] for text in kept]
    if others:
        labels.append([f"{len(others):,} others", sum(counts[text] for text in others)])
    return {
        "name": name,
        "kind": "categories",
        "labels": labels,
        "missing": len(texts) - counts.total(),
        "codes": _bytes(np.array([codes.get(text, 0) for text in texts])),
    }


def _bytes(codes: np.ndarray) -> str:
    return base64.b64encode(codes.astype(np.uint8).tobytes()).decode()
