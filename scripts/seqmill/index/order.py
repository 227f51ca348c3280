"""The order of the unique sequences: those to compute by descending length, then the reused ones likewise."""

from __future__ import annotations

import numpy as np

from seqmill.store.reuse import Source

BLOCK_ROWS = 1 << 20


def unique_sequences(
    digests: np.ndarray, num_tokens: np.ndarray, rejected: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find the unique sequences among the records and put them in order.

    Args:
        digests: uint8 (num_records, 16), of the cleaned sequences.
        num_tokens: int64 (num_records,), tokens kept of each.
        rejected: bool (num_records,), records that get no row.

    Returns:
        first_records: int64 (num_sequences,), the first record of each unique sequence, by
            descending number of tokens, ties by first appearance.
        rows: int64 (num_records,), each record's position in `first_records`; -1 if rejected.
    """
    candidates = np.flatnonzero(~rejected)
    high, low = np.ascontiguousarray(digests[candidates]).view(">u8").T
    by_digest = np.lexsort((low, high))  # stable: equal digests stay in input order
    high, low, sorted_records = high[by_digest], low[by_digest], candidates[by_digest]
    is_first = np.ones(len(candidates), bool)
    is_first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    firsts = sorted_records[is_first]
    order = np.lexsort((firsts, -num_tokens[firsts]))
    row_of_group = np.empty(len(firsts), np.int64)
    row_of_group[order] = np.arange(len(firsts))
    rows = np.full(len(rejected), -1, np.int64)
    rows[sorted_records] = row_of_group[np.cumsum(is_first) - 1]
    return firsts[order].astype(np.int64), rows


def reused_last(
    first_records: np.ndarray, rows: np.ndarray, is_reused: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put the reused sequences behind the others, both in the order that they have.

    Args:
        first_records, rows: as `unique_sequences` gives them.
        is_reused: bool (num_sequences,).

    Returns:
        first_records, rows: in the new order.
        order: int64 (num_sequences,), the row that each sequence had.
    """
    order = np.argsort(is_reused, kind="stable")
    places = np.empty(len(order) + 1, np.int64)
    places[order] = np.arange(len(order))
    places[-1] = -1  # of rejected records, whose row is -1
    return first_records[order], places[rows], order


def find_reused(digests: np.ndarray, sources: list[Source]) -> tuple[np.ndarray, np.ndarray]:
    """Find the sequences that files have; the first file that has one counts, in it the first row.

    Args:
        digests: uint8 (num_sequences, 16), each once.
        sources: the files.

    Returns:
        files: int32 (num_sequences,), which file has the sequence; -1 if none.
        rows: int64 (num_sequences,), and in which row.
    """
    files, rows = np.full(len(digests), -1, np.int32), np.full(len(digests), -1, np.int64)
    if not sources:
        return files, rows
    wanted = _keys(digests)
    by_digest = np.argsort(wanted, kind="stable")
    wanted = wanted[by_digest]
    for number, source in enumerate(sources):
        for start in range(0, len(source.digests), BLOCK_ROWS):
            keys = _keys(source.digests[start : start + BLOCK_ROWS])
            order = np.argsort(keys, kind="stable")  # a search for sorted keys is many times as fast
            keys = keys[order]
            places = np.searchsorted(wanted, keys)
            places[places == len(wanted)] = 0
            found = np.flatnonzero(wanted[places] == keys)
            sequences = by_digest[places[found]]
            is_new = files[sequences] < 0
            sequences, new_rows = sequences[is_new], start + order[found[is_new]]
            files[sequences] = number
            rows[sequences[::-1]] = new_rows[::-1]  # of equal digests the first is written last
    return files, rows


def _keys(digests: np.ndarray) -> np.ndarray:
    """Return digests as values that NumPy can sort."""
    return np.ascontiguousarray(digests).view("S16").ravel()
