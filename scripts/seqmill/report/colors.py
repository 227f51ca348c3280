"""The colors of the report's map: by length, and by a column of the user's table."""

import base64
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from seqmill.base.files import refuse_special
from seqmill.errors import SeqmillError
from seqmill.store.embeddings import EmbeddingsFile, ids_of, read_ids

MISSING = ("", "NA", "N/A", "NaN", "nan")
MAX_CATEGORIES = 10  # map.js has as many colors
SHOWN_UNKNOWN = 5
SHOWN_LABEL = 40  # characters
QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"')

log = logging.getLogger(__name__)


def column_scale(
    path: Path, column: str, embeddings: EmbeddingsFile, rows: np.ndarray, left_out: set[str]
) -> dict[str, Any]:
    """Return the scale of a column of a table: numbers or categories.

    A column is categories if it has values that are not numbers, or only whole numbers with at most MAX_CATEGORIES
    different values (clusters, for example). A record has no value if its field is in MISSING or it is not in the
    table.

    Args:
        path: tab-separated, with a header line and ids in the first column; rows for other records are ignored.
        column: the column's name.
        embeddings: the file whose records the table describes.
        rows: int64, increasing, the rows shown.
        left_out: ids of records without an embedding.

    Raises:
        SeqmillError: the table or the column is missing; an id occurs twice, or no id belongs to a record; a number
            is not finite.
    """
    ids = ids_of(embeddings, rows)
    values, num_rows = _read_column(path, column, set(ids))
    log.info("%s: %d of its %d rows are of the %d embeddings shown", path, len(values), num_rows, len(ids))
    if num_rows and len(ids) and not values:
        _require_known(path, column, embeddings, left_out)
    texts = [values.get(id_, "") for id_ in ids]
    numbers = _as_numbers(texts)
    if numbers is None:
        return _category_scale(column, texts)
    for place in np.flatnonzero(~np.isfinite(numbers)):
        if texts[place] not in MISSING:
            raise SeqmillError(
                f"{path}: {texts[place]!r}, the {column} of {ids[place]!r}, is not a finite number, though all others "
                "are numbers; leave the field empty, or write NA"
            )
    known = numbers[~np.isnan(numbers)]
    is_category = (known % 1 == 0).all() and len(np.unique(known)) <= MAX_CATEGORIES
    return _category_scale(column, texts) if is_category else number_scale(column, numbers)


def require_column(path: Path, column: str) -> None:
    """Raise a SeqmillError unless the table exists and has the column after its ids; see `column_scale`."""
    next(_rows_of(path, column), None)


def _rows_of(path: Path, column: str) -> Iterator[tuple[int, str, str]]:
    """Yield each line's number, its id and its field in the column."""
    refuse_special(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = [_unquoted(name) for name in file.readline().rstrip("\n").split("\t")]
            if len(header) == 1:
                raise SeqmillError(f"{path}: its first line has no tab: {header[0]!r}; save it tab-separated")
            if column not in header[1:]:
                names = ", ".join(header[1:])
                raise SeqmillError(f"{path}: has no column {column!r}; the columns after the ids are: {names}")
            place = header.index(column, 1)
            for number, line in enumerate(file, start=2):
                fields = line.rstrip("\n").split("\t")
                if fields == [""]:
                    continue
                if not place < len(fields) <= len(header):  # with more fields, columns and header do not match
                    raise SeqmillError(
                        f"{path}, line {number}: {len(fields)} fields, but the header has {len(header)} names"
                    )
                yield number, _unquoted(fields[0]), _unquoted(fields[place]).strip()
    except FileNotFoundError:
        raise SeqmillError(f"{path}: no such table") from None
    except IsADirectoryError:
        raise SeqmillError(f"{path}: is a folder; name the table in it") from None
    except UnicodeDecodeError as error:
        raise SeqmillError(f"{path}: not a tab-separated table in UTF-8: {error}") from error


def _unquoted(field: str) -> str:
    """Remove the quotes that pandas, R and records.tsv.gz put around a whole field; other quotes are text."""
    return field[1:-1].replace('""', '"') if QUOTED.fullmatch(field) else field


def _read_column(path: Path, column: str, wanted: set[str]) -> tuple[dict[str, str], int]:
    """Return the column's values for the wanted ids, and the table's number of rows."""
    values: dict[str, str] = {}
    num_rows = 0
    for number, id_, text in _rows_of(path, column):
        if id_ in values:
            raise SeqmillError(f"{path}, line {number}: the id {id_!r} occurs twice")
        if id_ in wanted:
            values[id_] = text
        num_rows += 1
    return values, num_rows


def _require_known(path: Path, column: str, embeddings: EmbeddingsFile, left_out: set[str]) -> None:
    """Raise a SeqmillError if no row of the table belongs to a record, shown or not."""
    named = dict.fromkeys(id_ for _, id_, _ in _rows_of(path, column))
    if named.keys().isdisjoint(left_out) and named.keys().isdisjoint(read_ids(embeddings)):
        first = ", ".join(map(repr, list(named)[:SHOWN_UNKNOWN]))
        more = f" and {len(named) - SHOWN_UNKNOWN:,} more" if len(named) > SHOWN_UNKNOWN else ""
        raise SeqmillError(
            f"{path}: no record of {embeddings.path} has any of its ids: {first}{more}; the first column must hold "
            "the ids of records.tsv.gz"
        )


def _as_numbers(texts: list[str]) -> np.ndarray | None:
    """Return texts as float64, nan where missing; None if all are missing or any is not a number."""
    if all(text in MISSING for text in texts) or any("_" in text for text in texts):  # Python reads 1_0 as 10
        return None
    try:
        return np.array([np.nan if text in MISSING else float(text) for text in texts])
    except ValueError:
        return None


def number_scale(name: str, numbers: np.ndarray, is_log: bool = False) -> dict[str, Any]:
    """Return a scale of numbers (float64, nan where missing).

    `codes` are uint8 in base64, one per row shown: 0 is missing, 1 the lowest value, 255 the highest.
    """
    known = ~np.isnan(numbers)
    low, high = (float(numbers[known].min()), float(numbers[known].max())) if known.any() else (1.0, 1.0)
    values, ends = (np.log(numbers), np.log([low, high])) if is_log else (numbers, np.array([low, high]))
    shares = (values - ends[0]) / (ends[1] - ends[0] if high > low else 1)
    codes = np.where(known, 1 + np.round(254 * np.nan_to_num(shares)), 0)
    return {"name": name, "kind": "numbers", "low": low, "high": high, "log": is_log, "codes": _in_base64(codes)}


def _category_scale(name: str, texts: list[str]) -> dict[str, Any]:
    """Return a scale of categories, the most frequent first.

    `codes` are uint8 in base64, one per row shown: 0 is missing, k is the k-th of `labels` (text, number of rows).
    A label after the first MAX_CATEGORIES stands for all other categories.
    """
    counts = Counter(text for text in texts if text not in MISSING)
    ordered = sorted(counts, key=lambda text: (-counts[text], text))
    kept, others = ordered[:MAX_CATEGORIES], ordered[MAX_CATEGORIES:]
    codes = {text: number for number, text in enumerate(kept, 1)} | dict.fromkeys(others, MAX_CATEGORIES + 1)
    labels = [[text if len(text) <= SHOWN_LABEL else text[:SHOWN_LABEL] + "…", counts[text]] for text in kept]
    if others:
        labels.append([f"{len(others):,} others", sum(counts[text] for text in others)])
    missing = len(texts) - counts.total()
    in_base64 = _in_base64(np.array([codes.get(text, 0) for text in texts]))
    return {"name": name, "kind": "categories", "labels": labels, "missing": missing, "codes": in_base64}


def _in_base64(codes: np.ndarray) -> str:
    return base64.b64encode(codes.astype(np.uint8).tobytes()).decode()
