"""Columns of texts, stored end to end: reading many rows at once is much faster than one by one."""

from itertools import pairwise

import numpy as np

LONG = 256  # bytes


def texts_end_to_end(blob: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Return the texts of some rows (int64, in any order) end to end, and their boundaries, int64 (len(rows) + 1,).

    `blob` (uint8) has the column's texts in UTF-8 end to end; `offsets` (int64 (n + 1,)) tell where each begins.
    """
    blob, rows = np.asarray(blob), np.asarray(rows)
    starts, ends = offsets[rows], offsets[rows + 1]
    bounds = np.concatenate([[0], np.cumsum(ends - starts)])
    if len(rows) == 0 or np.array_equal(starts[1:], ends[:-1]):
        return blob[starts[0] : ends[-1]].tobytes() if len(rows) else b"", bounds
    if bounds[-1] > LONG * len(rows):  # an index for every byte would take eight times the memory
        return b"".join([blob[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]), bounds
    places = np.repeat(starts - bounds[:-1], ends - starts)
    places += np.arange(bounds[-1])
    return blob.take(places).tobytes(), bounds


def split_bytes(joined: bytes, bounds: np.ndarray) -> list[bytes]:
    """Split texts joined by `texts_end_to_end`; they stay UTF-8."""
    return [joined[start:end] for start, end in pairwise(bounds.tolist())]


def split_texts(joined: bytes, bounds: np.ndarray) -> list[str]:
    """Split and decode texts joined by `texts_end_to_end`."""
    if joined.isascii():  # byte and character positions are equal
        text = joined.decode()
        return [text[start:end] for start, end in pairwise(bounds.tolist())]
    return [text.decode() for text in split_bytes(joined, bounds)]


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Return where values of these lengths begin when stored end to end, and the end: int64 (n + 1,)."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
