"""The report's map: which embeddings it shows, and their positions in two dimensions."""

import base64
import importlib.util
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from seqmill.base.files import name_errors
from seqmill.errors import SeqmillError
from seqmill.store.embeddings import EmbeddingsFile, ids_of, read_rows

MAX_SHOWN = 100_000  # points
MAX_NAMED = 20_000  # with more points, the page does not hold their ids
MIN_UMAP, MAX_UMAP = 50, 10_000  # points: fewer show no structure, more take minutes
UMAP_COMPONENTS = 50
BLOCK_BYTES = 8 << 20
LEVELS = 65535  # steps of a coordinate, over the width of the map
SHOWN_ID = 80  # characters
GOLDEN = (5**0.5 - 1) / 2

log = logging.getLogger(__name__)


def draw_maps(embeddings: EmbeddingsFile) -> dict[str, Any]:
    """Return the points of the report's maps as the page holds them.

    Returns:
        shown, total: the number of rows shown (see `shown_rows`), and of all rows.
        ids, lengths: of the rows shown; empty if there are more than MAX_NAMED.
        maps: for each projection its title; how many of the points it shows (again by `shown_rows`); both axes (title,
            lowest and highest value); x and y, from 0 (lowest) to 65535 (highest), little-endian uint16 in base64.
            Empty if there are fewer than three rows, or all are alike.
    """
    total, dim = embeddings.array.shape
    rows = shown_rows(total, MAX_SHOWN)
    drawn: dict[str, Any] = {"shown": len(rows), "total": total, "ids": [], "lengths": [], "maps": []}
    if len(rows) <= MAX_NAMED:
        drawn["ids"] = [id_ if len(id_) <= SHOWN_ID else id_[:SHOWN_ID] + "…" for id_ in ids_of(embeddings, rows)]
        drawn["lengths"] = embeddings.lengths[rows].tolist()
    if len(rows) < 3 or dim < 2:
        return drawn
    with_umap = len(rows) >= MIN_UMAP and importlib.util.find_spec("umap") is not None
    few = min(UMAP_COMPONENTS, dim) if with_umap else 2
    points, shares = principal_components(partial(_read, embeddings), rows, dim, few)
    if not shares.any():
        return drawn
    axes = [f"PC {number + 1} ({100 * share:.1f} % of the variance)" for number, share in enumerate(shares[:2])]
    drawn["maps"].append(_map("Principal components", axes, points[:, :2]))
    if with_umap:
        chosen = shown_rows(len(points), MAX_UMAP)
        drawn["maps"].append(_map("UMAP", ["UMAP 1", "UMAP 2"], _umap(points[chosen])))
    return drawn


def shown_rows(total: int, most: int) -> np.ndarray:
    """Return at most `most` of `total` rows (int64): one from each of equal stretches, in order, always the same ones.

    Multiples of the golden ratio choose the row within a stretch, so that the choice does not follow a period in the
    file. The page's script computes the same rows (`spread` in map.js).
    """
    shown = min(total, most)
    begins = np.arange(shown + 1, dtype=np.int64) * total // max(shown, 1)
    shares = np.arange(shown) * GOLDEN % 1
    return begins[:-1] + np.floor(shares * np.diff(begins)).astype(np.int64)


def principal_components(
    read: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, dim: int, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Project rows onto their principal components (Pearson 1901, doi:10.1080/14786440109462720).

    These are the eigenvectors of the covariance, which is summed over blocks of rows: memory holds a block and two
    matrices (hidden_dim, hidden_dim). The sign makes a component's largest entry positive. `read` returns the vectors
    (n, `dim`) of given rows (int64, at least two); it is called three times for each row.

    Return the projections, float64 (len(rows), number), and each component's share of the variance, float64 (number,),
    zeros if all rows are alike.
    """
    block_rows = max(BLOCK_BYTES // (8 * dim), 1)
    blocks = [rows[start : start + block_rows] for start in range(0, len(rows), block_rows)]
    mean = sum(read(block).sum(axis=0, dtype=np.float64) for block in blocks) / len(rows)
    products = np.zeros((dim, dim))
    for block in blocks:
        centered = read(block) - mean
        products += centered.T @ centered
    values, vectors = np.linalg.eigh(products)
    values, vectors = values[::-1][:number].clip(0), vectors[:, ::-1][:, :number]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])])
    places = np.concatenate([(read(block) - mean) @ vectors for block in blocks])
    total = np.trace(products)
    # For rows that are all alike, only the rounding of their mean remains.
    alike = total <= len(rows) * dim * (1e-12 * np.abs(mean).max()) ** 2
    return places, np.zeros(number) if alike else values / total


def _read(embeddings: EmbeddingsFile, rows: np.ndarray) -> np.ndarray:
    """Read the vectors of rows (int64, increasing).

    Not through the memory map: rows spread over the file would bring every page of it into memory.
    """
    if rows[-1] - rows[0] == len(rows) - 1:
        return read_rows(embeddings, int(rows[0]), int(rows[-1]) + 1)
    array = embeddings.array
    vectors = np.empty((len(rows), array.shape[1]), array.dtype)
    with name_errors(embeddings.path), embeddings.path.open("rb", buffering=0) as file:
        for vector, row in zip(vectors, rows.tolist(), strict=True):
            if os.preadv(file.fileno(), [vector], array.offset + row * vector.nbytes) != vector.nbytes:
                raise SeqmillError(f"{embeddings.path}: became shorter while it was read; merge the shards again")
    return vectors


def _umap(points: np.ndarray) -> np.ndarray:
    """Project points by UMAP (McInnes et al. 2018, arXiv:1802.03426), with its defaults and a fixed seed."""
    import umap

    log.info("UMAP of %d points by umap %s", len(points), umap.__version__)
    return umap.UMAP(random_state=0, n_jobs=1).fit_transform(points.astype(np.float32))


def _map(title: str, names: list[str], points: np.ndarray) -> dict[str, Any]:
    lows, highs = points.min(axis=0), points.max(axis=0)
    levels = np.round((points - lows) / np.where(highs > lows, highs - lows, 1) * LEVELS).astype("<u2")
    ends = zip(names, lows.tolist(), highs.tolist(), strict=True)
    axes = [{"title": name, "low": low, "high": high} for name, low, high in ends]
    x, y = (base64.b64encode(column.tobytes()).decode() for column in levels.T)
    return {"title": title, "shown": len(points), "axes": axes, "x": x, "y": y}
