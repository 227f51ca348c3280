"""An embeddings file with given vectors, as the merge writes it, without a FASTA or model."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from seqmill.base.hdf5 import RowWriter, new_hdf5, write_attributes
from seqmill.spec.fingerprint import Fingerprint
from seqmill.store.embeddings import EMBEDDINGS_FORMAT


def write_embeddings(path: Path, vectors: np.ndarray, ids: list[str] | None = None, **fields: object) -> Path:
    """Write an embeddings file; `fields` replace those of the fingerprint. Ids default to r0, r1 ..."""
    return write_blocks(path, vectors.shape, [vectors.astype(np.float32)], ids, **fields)


def write_blocks(
    path: Path,
    shape: tuple[int, int],
    blocks: Iterable[np.ndarray],
    ids: list[str] | None = None,
    **fields: object,
) -> Path:
    """Write an embeddings file of `shape` from float32 blocks."""
    known = {"index_digest": "0", "model": "untrained:none", "model_digest": "1", "layers": "6", "pooling": "mean"}
    fingerprint = Fingerprint(**{**known, "precision": "float32", **fields})  # type: ignore[arg-type]
    rows = np.arange(shape[0])
    with new_hdf5(path) as file:
        outputs = [{"dataset": "embeddings", "layer": int(fingerprint.layers), "pooling": fingerprint.pooling}]
        attributes = {"embeddings_format": EMBEDDINGS_FORMAT, "outputs": json.dumps(outputs), "num_layers": 6}
        write_attributes(file, {**attributes, **fingerprint.attributes()})
        file["lengths"] = (rows % 1000 + 1).astype(np.int32)
        texts_of = (lambda block: [ids[row] for row in block]) if ids else (lambda block: [f"r{row}" for row in block])
        file.write_strings("sequence_ids", rows, texts_of)
        file.reserve("embeddings", shape, np.float32)
    with RowWriter(path, "embeddings") as writer:
        for block in blocks:
            writer.append(block)
    return path


def random_blocks(shape: tuple[int, int], rows: int = 65536, seed: int = 1) -> Iterator[np.ndarray]:
    """Yield float32 blocks of standard normal vectors."""
    generator = np.random.default_rng(seed)
    for start in range(0, shape[0], rows):
        yield generator.standard_normal((min(rows, shape[0] - start), shape[1]), np.float32)
