"""The order of the unique sequences: first those to compute, then those to reuse, each by descending length."""

import numpy as np

from seqmill.store.reuse import Source

BLOCK_ROWS = 1 << 20


def unique_sequences(
    digests: np.ndarray, num_tokens: np.ndarray, rejected: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find and order the unique sequences among the records.

    Args:
        digests: uint8 (num_records, 16), of the cleaned sequences.
        num_tokens: int64 (num_records,).
        rejected: bool (num_records,), records that get no row.

    Returns:
        first_records: int64 (num_sequences,), the first record of each unique sequence, by descending number of
            tokens, ties by first appearance.
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
    """Move the reused sequences (bool (num_sequences,)) behind the others; both keep their order.

    Return the results of `unique_sequences` in the new order, and each sequence's old row, int64 (num_sequences,).
    """
    order = np.argsort(is_reused, kind="stable")
    places = np.empty(len(order) + 1, np.int64)
    places[order] = np.arange(len(order))
    places[-1] = -1  # rejected records have row -1
    return first_records[order], places[rows], order


def find_reused(digests: np.ndarray, sources: list[Source]) -> tuple[np.ndarray, np.ndarray]:
    """Find sequences in earlier results by their digests.

    Args:
        digests: uint8 (num_sequences, 16), without duplicates.
        sources: the earlier results.

    Returns:
        files: int32 (num_sequences,), the number of the first file that has the sequence; -1 if none.
        rows: int64 (num_sequences,), its first row in that file; -1 if none.
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
            order = np.argsort(keys, kind="stable")  # searching sorted keys is many times as fast
            keys = keys[order]
            places = np.searchsorted(wanted, keys)
            places[places == len(wanted)] = 0
            found = np.flatnonzero(wanted[places] == keys)
            sequences = by_digest[places[found]]
            is_new = files[sequences] < 0
            sequences, new_rows = sequences[is_new], start + order[found[is_new]]
            files[sequences] = number
            rows[sequences[::-1]] = new_rows[::-1]  # reversed, so that the first of equal digests wins
    return files, rows


def _keys(digests: np.ndarray) -> np.ndarray:
    """Return digests as values that NumPy can sort."""
    return np.ascontiguousarray(digests).view("S16").ravel()
