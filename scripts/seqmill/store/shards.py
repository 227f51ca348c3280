"""The shard: one rank's embeddings, with their ids and index rows; and vectors of residues, if they are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from seqmill.base.files import whole_or_absent
from seqmill.base.hdf5 import (
    STRING_BLOCK,
    RowWriter,
    map_dataset,
    new_hdf5,
    open_hdf5,
    read_attributes,
    reserve_dataset,
    write_attributes,
    write_strings,
)
from seqmill.errors import SeqmillError
from seqmill.spec.fingerprint import Fingerprint
from seqmill.store.index import Index, residue_offsets

SHARD_ATTRIBUTES = ("rank", "world_size", "num_layers", "computed_by", "audit_sequences")
DATASETS = ("embeddings", "index_rows", "quarantined_rows", "sequence_ids")


@dataclass(frozen=True)
class Shard:
    """An open shard. Arrays are memory maps.

    Attributes:
        embeddings: float32 (num_sequences, hidden_dim), as stored.
        residues: the vectors of all residues end to end, (num_residues, number of layers * hidden_dim), in the dtype
            that the fingerprint says; (0, 0) if they are not kept.
        residue_offsets: int64 (num_sequences + 1,), where those of each sequence begin; empty if they are not kept.
        index_rows: int64 (num_sequences,), each row's unique sequence in the index.
        num_layers: of the model, which has layers 0 to num_layers.
        computed_by: the kinds of device and kernels, in words.
        audit: what `seqmill.embed.audit` found, as attributes of the file.
        quarantined_rows: int64, the rank's sequences that are not in the shard, having no finite embedding.
    """

    path: Path
    rank: int
    world_size: int
    fingerprint: Fingerprint
    num_layers: int
    computed_by: list[str]
    audit: dict[str, Any]
    embeddings: np.ndarray
    index_rows: np.ndarray
    quarantined_rows: np.ndarray
    residues: np.ndarray
    residue_offsets: np.ndarray


class ShardWriter:
    """Writes the vectors of a shard, in order."""

    def __init__(self, embeddings: RowWriter, residues: RowWriter | None) -> None:
        self._embeddings, self._residues = embeddings, residues

    def append(self, embeddings: np.ndarray, residues: np.ndarray | None = None) -> None:
        """Write the next embeddings, and the vectors of their residues if they are kept."""
        self._embeddings.append(embeddings)
        if self._residues is not None and residues is not None:
            self._residues.append(residues)


@contextmanager
def new_shard(
    path: Path,
    index: Index,
    rows: np.ndarray,
    quarantined: np.ndarray,
    hidden_dim: int,
    attributes: dict[str, Any],
    residue_dim: int = 0,
) -> Iterator[ShardWriter]:
    """Open a writer of vectors; the shard appears at `path` when the block has ended with every row written.

    Args:
        path: the shard's final name.
        index: for the ids.
        rows: int64, the index rows of the shard, in order; may be empty.
        quarantined: int64, the index rows that the shard should hold and does not.
        hidden_dim: numbers in a row, of all outputs side by side.
        attributes: rank, world_size, the fingerprint and whatever else describes the shard.
        residue_dim: numbers in the vector of a residue, of all layers; 0 if they are not kept.
    """
    residue_dtype = attributes["per_residue"]
    with whole_or_absent(path) as temporary:
        with new_hdf5(temporary) as file:
            write_attributes(file, attributes)
            file["index_rows"] = rows
            file["quarantined_rows"] = quarantined
            write_strings(file, "sequence_ids", rows, index.sequence_ids_of)
            reserve_dataset(file, "embeddings", (len(rows), hidden_dim), np.float32)
            if residue_dtype:
                offsets = residue_offsets(index, rows)
                file["residue_offsets"] = offsets
                reserve_dataset(file, "residues", (int(offsets[-1]), residue_dim), residue_dtype)
        with ExitStack() as stack:
            names = ("embeddings", "residues") if residue_dtype else ("embeddings",)
            writers = [stack.enter_context(RowWriter(temporary, name)) for name in names]
            yield ShardWriter(writers[0], writers[1] if residue_dtype else None)


def open_shard(path: Path) -> Shard:
    """Open a shard.

    Raises:
        SeqmillError: absent, truncated, or not a shard.
    """
    with open_hdf5(path, "shard") as file:
        attributes = read_attributes(file)
        missing = [name for name in DATASETS if name not in file]
        missing += [name for name in SHARD_ATTRIBUTES if name not in attributes]
        if missing:
            raise SeqmillError(f"{path}: not a seqmill shard: lacks {', '.join(missing)}")
        try:
            fingerprint = Fingerprint.from_attributes(attributes)
        except SeqmillError as error:
            raise SeqmillError(f"{path}: {error}") from None
        residues, offsets = np.empty((0, 0), np.float16), np.empty(0, np.int64)
        if fingerprint.per_residue:
            if missing := [name for name in ("residues", "residue_offsets") if name not in file]:
                raise SeqmillError(f"{path}: lacks {', '.join(missing)}")
            residues, offsets = (map_dataset(path, file[name]) for name in ("residues", "residue_offsets"))
        return Shard(
            path,
            attributes["rank"],
            attributes["world_size"],
            fingerprint,
            attributes["num_layers"],
            [kind for kind in attributes["computed_by"].split("; ") if kind],
            {name: value for name, value in attributes.items() if name.startswith("audit_")},
            map_dataset(path, file["embeddings"]),
            map_dataset(path, file["index_rows"]),
            map_dataset(path, file["quarantined_rows"]),
            residues,
            offsets,
        )


def shard_ids(path: Path) -> Iterator[list[bytes]]:
    """Yield the shard's sequence ids in order, in blocks; in UTF-8, as decoding takes half as long as reading."""
    with open_hdf5(path, "shard") as file:
        ids = file["sequence_ids"]
        if h5py.check_string_dtype(ids.dtype) is None:
            raise TypeError("sequence_ids are not strings")
        for start in range(0, len(ids), STRING_BLOCK):
            yield ids[start : start + STRING_BLOCK].tolist()
