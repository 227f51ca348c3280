"""Embeddings in two dimensions, for the report: which rows are shown, and where they lie."""

from __future__ import annotations

import base64
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from seqmill.errors import SeqmillError
from seqmill.store.embeddings import Embeddings, ids_of, read_rows

MAX_SHOWN = 100_000  # points
MAX_NAMED = 20_000  # up to so many points the page holds their ids
MIN_UMAP, MAX_UMAP = 50, 10_000  # points: of fewer there is nothing to see, for more it takes minutes
UMAP_COMPONENTS = 50
BLOCK_BYTES = 8 << 20
LEVELS = 65535  # of a coordinate, over the width of the map
SHOWN_ID = 80  # characters
GOLDEN = (5**0.5 - 1) / 2

log = logging.getLogger(__name__)


def draw_maps(embeddings: Embeddings) -> dict[str, Any]:
    """Return the points of the report's maps, as it embeds them.

    Returns:
        shown, total: how many rows are shown, of how many; `shown_rows` says which.
        ids, lengths: of the rows shown; empty above MAX_NAMED.
        maps: of each projection its title; how many of the points it shows (again by `shown_rows`); both axes (title,
            lowest and highest value); x and y, from 0 (lowest) to 65535 (highest), little-endian uint16 in base64.
            Empty if there are too few rows, or they are all alike.
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
    with _reader(embeddings) as read:
        points, shares = principal_components(read, rows, dim, few)
    if not shares.any():
        return drawn
    axes = [f"PC {number + 1} ({100 * share:.1f} % of the variance)" for number, share in enumerate(shares[:2])]
    drawn["maps"].append(_map("Principal components", axes, points[:, :2]))
    if with_umap:
        chosen = shown_rows(len(points), MAX_UMAP)
        drawn["maps"].append(_map("UMAP", ["UMAP 1", "UMAP 2"], _umap(points[chosen])))
    return drawn


def shown_rows(total: int, most: int) -> np.ndarray:
    """Return at most `most` of `total` rows (int64), in order, the same ones every time: one of each even stretch.

    Which one of a stretch goes by multiples of the golden ratio, so that a period in the file is not met by another.
    The page's script computes the same (`spread` in map.js).
    """
    shown = min(total, most)
    begins = np.arange(shown + 1, dtype=np.int64) * total // max(shown, 1)
    shares = np.arange(shown) * GOLDEN % 1
    return begins[:-1] + np.floor(shares * np.diff(begins)).astype(np.int64)


def principal_components(
    read: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, dim: int, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Project rows onto their principal components (Pearson 1901, doi:10.1080/14786440109462720).

    The eigenvectors of the covariance, which is summed over blocks of rows: memory is that of a block and of two
    matrices (hidden_dim, hidden_dim). The sign is such that a component's largest entry is positive.

    Args:
        read: gives the vectors (n, hidden_dim) of some of the rows; each is asked for three times.
        rows: int64, at least two, those that are meant.
        dim: hidden_dim.
        number: how many components.

    Returns:
        float64 (len(rows), number), each row's place, and float64 (number,), each component's share of the variance
        (zeros if all rows are alike).
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
    # What is left of rows that are all alike is the rounding of their mean.
    alike = total <= len(rows) * dim * (1e-12 * np.abs(mean).max()) ** 2
    return places, np.zeros(number) if alike else values / total


@contextmanager
def _reader(embeddings: Embeddings) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """Yield a function that reads the vectors of rows (int64, increasing) one by one.

    Not by the memory map, of which so many rows would touch every page of a file of gigabytes.
    """
    array = embeddings.array
    with embeddings.path.open("rb", buffering=0) as file:

        def read(rows: np.ndarray) -> np.ndarray:
            if rows[-1] - rows[0] == len(rows) - 1:
                return read_rows(embeddings, int(rows[0]), int(rows[-1]) + 1)
            vectors = np.empty((len(rows), array.shape[1]), array.dtype)
            for vector, row in zip(vectors, rows.tolist(), strict=True):
                if os.preadv(file.fileno(), [vector], array.offset + row * vector.nbytes) != vector.nbytes:
                    raise SeqmillError(f"{embeddings.path}: became shorter while it was read; merge the shards again")
            return vectors

        yield read


def _umap(points: np.ndarray) -> np.ndarray:
    """Lay points out by UMAP (McInnes et al. 2018, arXiv:1802.03426), with its defaults and a seed of its own."""
    import umap

    log.info("UMAP of %d points by umap %s", len(points), umap.__version__)
    return umap.UMAP(random_state=0, n_jobs=1).fit_transform(points.astype(np.float32))


def _map(title: str, axes: list[str], points: np.ndarray) -> dict[str, Any]:
    lowest, highest = points.min(axis=0), points.max(axis=0)
    width = np.where(highest > lowest, highest - lowest, 1)
    levels = np.round((points - lowest) / width * LEVELS).astype("<u2")
    return {
        "title": title,
        "shown": len(points),
        "axes": [
            {"title": axis, "low": float(low), "high": float(high)}
            for axis, low, high in zip(axes, lowest, highest, strict=True)
        ],
        **{name: base64.b64encode(levels[:, number].tobytes()).decode() for number, name in enumerate("xy")},
    }
