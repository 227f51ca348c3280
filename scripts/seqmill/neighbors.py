"""The nearest neighbors of vectors in an embeddings file: cosine, exact, in blocks of bounded size."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas

from seqmill.base.files import refuse_folder, refuse_shared, whole_or_absent
from seqmill.errors import SeqmillError
from seqmill.store.embeddings import EmbeddingsFile, ids_of, read_rows

QUERY_ROWS, TARGET_ROWS = 1024, 8192  # per block
COLUMNS = ("query", "query_row", "rank", "id", "row", "score")
Queries = np.ndarray | EmbeddingsFile | str | Path

log = logging.getLogger(__name__)


def search(query: Queries, embeddings: EmbeddingsFile | str | Path, k: int = 10) -> pandas.DataFrame:
    """Return the `k` nearest neighbors of each query by cosine, found by comparing it with every record.

    Args:
        query: a vector (hidden_dim,), such as `e["sp|P12345|NAME"]`; several (n, hidden_dim); an embeddings file or its
            path.
        embeddings: the embeddings file to search, or its path.
        k: how many neighbors; all, if the file has fewer records.

    Returns:
        A row for each query and neighbor, the nearest first: `query` (the id if the query is a file, else the number),
        `query_row` (its number, from 0), `rank` (from 1), `id`, `row`, `score` (the cosine in float64; 0 if a vector is
        zero). Copies of a vector have equal scores; equal scores are in the order of the rows.

    Raises:
        SeqmillError: the dimensions, or the models, layers or poolings of two files, differ; a vector is not finite.
    """
    target = embeddings if isinstance(embeddings, EmbeddingsFile) else EmbeddingsFile(embeddings)
    frames = list(_neighbors(EmbeddingsFile(query) if isinstance(query, str | Path) else query, target, k))
    return pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame(columns=list(COLUMNS))


def write_neighbors(
    query: Path, target: Path, output: Path, k: int = 10, layer: int | None = None, pooling: str | None = None
) -> None:
    """Write what `search` finds as a tab-separated table; `layer` and `pooling` choose the output of both files."""
    refuse_shared([output], (query, target))
    refuse_folder(output)
    embeddings = EmbeddingsFile(target, layer, pooling)
    frames = _neighbors(EmbeddingsFile(query, layer, pooling), embeddings, k)
    with whole_or_absent(output) as temporary, temporary.open("w", encoding="utf-8", newline="") as text:
        text.write("\t".join(COLUMNS) + "\n")
        for frame in frames:
            frame.to_csv(text, sep="\t", header=False, index=False)
    space = f"layer {embeddings.layer}, {embeddings.pooling}"
    log.info("%s: neighbors among %d records of %s (%s)", output, len(embeddings), target, space)
    if embeddings.attrs.get("warning"):
        log.warning(embeddings.attrs["warning"])


def nearest(queries: np.ndarray, norms: np.ndarray, target: EmbeddingsFile, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows (int64) and cosines (float64) of the nearest neighbors, each (n, min(k, records)).

    A float32 product finds the candidates: the records whose cosine may be among the k best, given its rounding error.
    Each candidate's cosine is then summed by itself in float64. An inner product of d terms errs by at most about d
    roundings times the sum of the terms' magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, section
    3.1), which is at most 1 for unit vectors. `queries` are float64 (n, hidden_dim), `norms` theirs from `_norms`.
    """
    error = (queries.shape[1] + 8) * 2.0**-24  # 8 for rounding the vectors and the floors to float32
    k, unit = min(k, len(target)), (queries / norms[:, None]).astype(np.float32)
    best_rows, best_scores = np.zeros((len(queries), k), np.int64), np.full((len(queries), k), -np.inf)
    for start in range(0, len(target), TARGET_ROWS):
        block = read_rows(target, start, min(start + TARGET_ROWS, len(target)))
        lengths = _norms(block, start, f"{target.path}: row", "; merge the shards again")
        about = unit @ (block / lengths[:, None]).astype(np.float32).T
        floors = best_scores[:, -1] - error
        if start == 0 and k <= len(block):
            floors = np.partition(about, -k, axis=1)[:, -k] - 2 * error  # about has an error, too
        is_candidate = about >= floors[:, None].astype(np.float32)
        for query in np.flatnonzero(is_candidate.any(axis=1)):
            places = np.flatnonzero(is_candidate[query])
            products = (block[places].astype(np.float64) * queries[query]).sum(axis=1)
            scores = np.append(best_scores[query], np.clip(products / (norms[query] * lengths[places]), -1, 1))
            order = np.argsort(-scores, kind="stable")[:k]  # equal scores stay in the order of the rows
            best_rows[query], best_scores[query] = np.append(best_rows[query], start + places)[order], scores[order]
    return best_rows, best_scores


def _norms(vectors: np.ndarray, start: int, what: str, remedy: str = "") -> np.ndarray:
    """Return the norms in float64, 1 for a zero vector. Raise a SeqmillError if a vector is not finite."""
    norms = np.sqrt(np.square(vectors, dtype=np.float64).sum(axis=1))
    if not np.isfinite(norms).all():
        raise SeqmillError(f"{what} {start + int(np.argmin(np.isfinite(norms)))} is not finite{remedy}")
    return np.where(norms == 0, 1, norms)


def _neighbors(query: np.ndarray | EmbeddingsFile, target: EmbeddingsFile, k: int) -> Iterator[pandas.DataFrame]:
    """Check the arguments, then return an iterator over the tables of the blocks of queries."""
    if k < 1:
        raise SeqmillError(f"k is {k}; ask for at least one neighbor")
    if not isinstance(query, EmbeddingsFile):
        query = np.atleast_2d(np.asarray(query))
        if query.ndim != 2 or query.dtype.kind not in "fiu":
            raise SeqmillError(f"a query is a vector or an array of vectors, not {query.dtype} {query.shape}")
    width, dim = (query.array if isinstance(query, EmbeddingsFile) else query).shape[1], target.array.shape[1]
    if width != dim:
        raise SeqmillError(f"the queries have {width} dimensions, {target.path} has {dim}; embed both with one model")
    if isinstance(query, EmbeddingsFile):
        spaces = [(e.attrs.get("model_digest"), e.layer, e.pooling) for e in (query, target)]
        pairs = zip(("model_digest", "layer", "pooling"), *spaces, strict=True)
        if different := "; ".join(f"{name} is {one} and {other}" for name, one, other in pairs if one != other):
            both = f"{query.path} and {target.path}"
            raise SeqmillError(f"{both} can't be compared: {different}; embed both with the same model and settings")
    return (_table(query, start, target, k) for start in range(0, len(query), QUERY_ROWS))


def _table(query: np.ndarray | EmbeddingsFile, start: int, target: EmbeddingsFile, k: int) -> pandas.DataFrame:
    numbers = np.arange(start, min(start + QUERY_ROWS, len(query)))
    if isinstance(query, EmbeddingsFile):
        vectors, names = read_rows(query, start, start + len(numbers)), ids_of(query, numbers)
    else:
        vectors, names = query[numbers], numbers
    exact = vectors.astype(np.float64)
    # Scaled by powers of two, so that no square overflows or vanishes.
    exact = np.ldexp(exact, -np.frexp(np.abs(exact).max(axis=1, keepdims=True, initial=0))[1])
    rows, scores = nearest(exact, _norms(exact, start, "query"), target, k)
    flat, k = rows.reshape(-1), rows.shape[1]
    ranks = np.tile(np.arange(1, k + 1), len(rows))
    columns = (np.repeat(names, k), np.repeat(numbers, k), ranks, ids_of(target, flat), flat, scores.reshape(-1))
    return pandas.DataFrame(dict(zip(COLUMNS, columns, strict=True)))
