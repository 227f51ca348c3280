"""The nearest neighbors of vectors in an embeddings file: cosine, exact, in blocks of bounded size."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from seqmill.base.files import refuse_folder, refuse_to_replace, whole_or_absent
from seqmill.errors import SeqmillError
from seqmill.store.embeddings import Embeddings, ids_of, open_embeddings, read_rows

if TYPE_CHECKING:
    import pandas

QUERY_ROWS = 1024
TARGET_ROWS = 8192
PAIR_QUERIES = 64  # queries whose candidates are ranked at once; at most this times TARGET_ROWS pairs
PAIR_BYTES = 16 << 20
CROWD = 2  # candidates for each neighbor; where there are more, copies of vectors may be among them
UNIT = 2.0**-24  # rounding of float32
PLAIN_SQUARES = (1e-20, 1e30)  # sums of squares that float32 holds as well as any

COLUMNS = ("query", "query_row", "rank", "id", "row", "score")
# Vectors that differ in these do not lie in one space.
COMPARABLE = ("model_digest", "layer", "pooling")

log = logging.getLogger(__name__)


def search(
    query: np.ndarray | Embeddings | str | Path, embeddings: Embeddings | str | Path, k: int = 10
) -> pandas.DataFrame:
    """Return the `k` nearest neighbors of each query by cosine, found by comparing it with every record.

    Args:
        query: a vector (hidden_dim,), such as `e["P12345"]`, or several (n, hidden_dim); or an embeddings file, or
            its path.
        embeddings: the embeddings file to search, or its path.
        k: how many neighbors; all, if the file has fewer records.

    Returns:
        A row for each query and neighbor, in the order of the queries, the nearest first: `query` (the id if the
        query is a file, else the number), `query_row` (its number, from 0), `rank` (from 1), `id`, `row`, `score`
        (the cosine in float64). Equal scores are in the order of the rows; a zero vector has score 0 with any.

    Raises:
        SeqmillError: the dimensions, or the models, layers or poolings of two files, differ; a query is not finite.
    """
    import pandas

    target = _opened(embeddings)
    parts = [_columns(*found) for found in _neighbors(_opened_query(query), target, k)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS} if parts else {}
    return pandas.DataFrame(columns, columns=list(COLUMNS))


def write_neighbors(
    query: Path, target: Path, output: Path, k: int = 10, layer: int | None = None, pooling: str | None = None
) -> None:
    """Write what `search` finds as a tab-separated table, block by block: any number of queries in bounded memory.

    `layer` and `pooling` say which output of both files, as for `open_embeddings`.
    """
    for source in (query, target):
        refuse_to_replace(source, output)
    refuse_folder(output)
    embeddings = open_embeddings(target, layer, pooling)
    found = _neighbors(open_embeddings(query, layer, pooling), embeddings, k)
    with whole_or_absent(output) as temporary, temporary.open("w", encoding="utf-8", newline="") as text:
        table = csv.writer(text, delimiter="\t", lineterminator="\n")
        table.writerow(COLUMNS)
        for block in found:
            table.writerows(zip(*(column.tolist() for column in _columns(*block).values()), strict=True))
    space = f"layer {embeddings.layer}, {embeddings.pooling}"
    log.info("%s: neighbors among %d records of %s (%s)", output, len(embeddings), target, space)
    if embeddings.attrs.get("warning"):
        log.warning(embeddings.attrs["warning"])


def nearest(queries: np.ndarray, target: Embeddings, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows (int64) and cosines (float64) of the nearest neighbors, each (n, min(k, records)).

    A product in float32 finds the candidates: all whose cosine may be among the best, given the most that rounding
    can change. Those are computed in float64, one by one, so that a pair's score does not depend on the block it is
    in. The bound is that of Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: an inner product of d
    terms errs by at most about d units of the sum of the terms' magnitudes, which is at most 1 for unit vectors.

    Args:
        queries: finite, (n, hidden_dim).
        target: the embeddings file to search.
        k: at least 1.
    """
    exact = _scaled(queries.astype(np.float64))
    norms = _norms(exact)
    unit = (exact / norms[:, None]).astype(np.float32)
    margin = 2 * (queries.shape[1] + 8) * UNIT  # half of it for the norms of the target, in float32 as well
    k = min(k, len(target))
    best_rows = np.full((len(queries), k), len(target), np.int64)
    best_scores = np.full((len(queries), k), -np.inf)
    for start in range(0, len(target), TARGET_ROWS):
        block = read_rows(target, start, min(start + TARGET_ROWS, len(target))).astype(np.float32, copy=False)
        about = _about(unit, block, target, start)
        enough = best_scores[:, -1] - margin
        enough[~exact.any(axis=1) & (best_scores[:, -1] == 0)] = np.inf  # to a zero query all are as near as the first
        if start == 0 and k <= len(block):  # nothing to beat yet: the k-th best of these, as well as it is known
            enough = np.partition(about, len(block) - k, axis=1)[:, len(block) - k].astype(np.float64) - 2 * margin
        useful = None
        for first in range(0, len(queries), PAIR_QUERIES):
            some = slice(first, first + PAIR_QUERIES)
            wanted, places = np.nonzero(about[some] >= enough[some, None].astype(np.float32))
            if len(wanted) > CROWD * k * len(about[some]):
                useful = _first_copies(block, k) if useful is None else useful
                wanted, places = wanted[useful[places]], places[useful[places]]
            if len(wanted):
                scores = _cosines(exact[some], norms[some], block, wanted, places)
                better = scores > best_scores[some][wanted, -1]  # an equal score does not displace an earlier row
                wanted, places, scores = wanted[better], places[better], scores[better]
                _keep_best(best_rows[some], best_scores[some], wanted, start + places, scores)
    return best_rows, best_scores


def _about(unit: np.ndarray, block: np.ndarray, target: Embeddings, start: int) -> np.ndarray:
    """Return cosines in float32, (queries, rows of the block), of zero vectors 0."""
    squares = np.einsum("ij,ij->i", block, block)
    odd = np.flatnonzero(~((squares > PLAIN_SQUARES[0]) & (squares < PLAIN_SQUARES[1])))
    if len(odd):
        exact = block[odd].astype(np.float64)
        norms = _norms(exact)
        if not np.isfinite(norms).all():
            row = start + int(odd[np.flatnonzero(~np.isfinite(norms))[0]])
            raise SeqmillError(f"{target.path}: row {row} is not finite; merge the shards again")
        block, squares = block.copy(), squares.copy()
        block[odd], squares[odd] = exact / norms[:, None], 1
    about = unit @ block.T
    about /= np.sqrt(squares)
    return about


def _cosines(
    queries: np.ndarray, norms: np.ndarray, block: np.ndarray, wanted: np.ndarray, places: np.ndarray
) -> np.ndarray:
    """Return the cosine of each pair of a query (float64) and a row of the block, as float64 (pairs,).

    Sums along a row only: equal vectors get equal scores, wherever they stand (which a matrix product does not give).
    """
    scores = np.empty(len(wanted))
    step = max(PAIR_BYTES // (8 * block.shape[1]), 1)
    for start in range(0, len(wanted), step):
        pairs = slice(start, start + step)
        rows = block[places[pairs]].astype(np.float64)
        products = (queries[wanted[pairs]] * rows).sum(axis=1)
        scores[pairs] = products / (norms[wanted[pairs]] * _norms(rows))
    return np.clip(scores, -1, 1)


def _keep_best(
    best_rows: np.ndarray, best_scores: np.ndarray, wanted: np.ndarray, rows: np.ndarray, scores: np.ndarray
) -> None:
    """Merge candidates (the query, row and score of each) into the best of each query, in place."""
    k = best_rows.shape[1]
    queries = np.concatenate([np.repeat(np.arange(len(best_rows)), k), wanted])
    rows = np.concatenate([best_rows.reshape(-1), rows])
    scores = np.concatenate([best_scores.reshape(-1), scores])
    order = np.lexsort((rows, -scores, queries))
    # Every query has at least its k bests of before, so that k of its own stand at the beginning of its part.
    begins = np.searchsorted(queries[order], np.arange(len(best_rows)))
    taken = order[begins[:, None] + np.arange(k)]
    best_rows[:], best_scores[:] = rows[taken], scores[taken]


def _first_copies(block: np.ndarray, k: int) -> np.ndarray:
    """Return for each row whether it is among the first `k` with its values, bool (rows,); later ones win no rank."""
    seen: Counter[bytes] = Counter()
    first = np.empty(len(block), bool)
    for place, row in enumerate(block):
        values = row.tobytes()
        seen[values] += 1
        first[place] = seen[values] <= k
    return first


def _scaled(exact: np.ndarray) -> np.ndarray:
    """Return rows (float64) times powers of two, so that their squares neither overflow nor vanish: same directions."""
    _, exponents = np.frexp(np.abs(exact).max(axis=1, initial=0))
    return np.ldexp(exact, -exponents[:, None])


def _norms(exact: np.ndarray) -> np.ndarray:
    """Return the norms of the rows (float64), 1 for zero vectors: what is divided by them stays zero."""
    norms = np.sqrt(np.square(exact).sum(axis=1))
    norms[norms == 0] = 1
    return norms


def _neighbors(
    query: np.ndarray | Embeddings, target: Embeddings, k: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Check, then yield for each block of queries: their names, numbers, and their neighbors' ids, rows, scores."""
    if k < 1:
        raise SeqmillError(f"k is {k}; ask for at least one neighbor")
    array = query.array if isinstance(query, Embeddings) else query
    if array.shape[1] != target.array.shape[1]:
        raise SeqmillError(
            f"the queries have {array.shape[1]} dimensions, {target.path} has {target.array.shape[1]}; "
            "embed both with the same model"
        )
    if isinstance(query, Embeddings):
        _require_comparable(query, target)
    return _blocks_of_neighbors(query, target, k)


def _blocks_of_neighbors(
    query: np.ndarray | Embeddings, target: Embeddings, k: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    number = len(query)
    for start in range(0, number, QUERY_ROWS):
        numbers = np.arange(start, min(start + QUERY_ROWS, number))
        names: np.ndarray = numbers
        if isinstance(query, Embeddings):
            names, vectors = ids_of(query, numbers), read_rows(query, start, start + len(numbers))
        else:
            vectors = query[start : start + len(numbers)]
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise SeqmillError(f"query {start + int(np.argmin(finite))} is not finite")
        rows, scores = nearest(vectors, target, k)
        yield names, numbers, ids_of(target, rows.reshape(-1)).reshape(rows.shape), rows, scores


def _columns(
    names: np.ndarray, numbers: np.ndarray, ids: np.ndarray, rows: np.ndarray, scores: np.ndarray
) -> dict[str, np.ndarray]:
    k = rows.shape[1]
    ranks = np.tile(np.arange(1, k + 1), len(rows))
    flat = (np.repeat(names, k), np.repeat(numbers, k), ranks, ids.reshape(-1), rows.reshape(-1), scores.reshape(-1))
    return dict(zip(COLUMNS, flat, strict=True))


def _require_comparable(query: Embeddings, target: Embeddings) -> None:
    spaces = [
        {"model_digest": e.attrs.get("model_digest"), "layer": e.layer, "pooling": e.pooling} for e in (query, target)
    ]
    different = [name for name in COMPARABLE if spaces[0][name] != spaces[1][name]]
    said = "; ".join(f"{name} is {spaces[0][name]} and {spaces[1][name]}" for name in different)
    if said:
        raise SeqmillError(
            f"{query.path} and {target.path} can't be compared: {said}; embed both with the same model and settings"
        )


def _opened(embeddings: Embeddings | str | Path) -> Embeddings:
    return embeddings if isinstance(embeddings, Embeddings) else open_embeddings(embeddings)


def _opened_query(query: np.ndarray | Embeddings | str | Path) -> np.ndarray | Embeddings:
    if isinstance(query, Embeddings | str | Path):
        return _opened(query)
    array = np.atleast_2d(np.asarray(query))
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise SeqmillError(f"a query is a vector or an array of them, not {array.dtype} {array.shape}")
    return array
