"""The shard: one rank's embeddings, their ids and index rows, and the residue vectors if they are kept."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seqmill.base.files import whole_or_absent
from seqmill.base.hdf5 import RowWriter, map_dataset, new_hdf5, open_hdf5, read_attributes, write_attributes
from seqmill.errors import SeqmillError
from seqmill.spec.fingerprint import Fingerprint
from seqmill.store.index import Index, residue_offsets

SHARD_ATTRIBUTES = ("rank", "world_size", "num_layers", "computed_by", "audit_sequences")
DATASETS = ("embeddings", "index_rows", "quarantined_rows", "sequence_ids")
RESIDUE_DATASETS = ("residues", "residue_offsets")


@dataclass(frozen=True)
class Shard:
    """An open shard. Arrays are memory maps."""

    path: Path
    rank: int
    world_size: int
    fingerprint: Fingerprint
    num_layers: int  # of the model, which has layers 0 to num_layers
    computed_by: list[str]  # the kinds of device and kernels, in words
    audit: dict[str, Any]  # the file's attributes that begin with `audit_`, from `seqmill.embedding.audit`
    embeddings: np.ndarray  # float32 (num_sequences, hidden_dim), as stored
    index_rows: np.ndarray  # int64 (num_sequences,), the index row of each embedding
    quarantined_rows: np.ndarray  # int64, the rank's index rows without a finite embedding, which are left out
    # The residue vectors end to end, (num_residues, number of layers * hidden_dim), in the dtype of
    # `fingerprint.per_residue`; (0, 0) if they are not kept.
    residues: np.ndarray
    residue_offsets: np.ndarray  # int64 (num_sequences + 1,), where each sequence's begin; empty if not kept


@dataclass(frozen=True)
class ShardWriter:
    """Writes the vectors of a shard, in order."""

    writers: list[RowWriter]

    def append(self, embeddings: np.ndarray, residues: np.ndarray | None = None) -> None:
        """Write the next embeddings, and their residue vectors if they are kept."""
        for writer, rows in zip(self.writers, (embeddings, residues), strict=False):
            writer.append(rows)


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
        rows, quarantined: int64, the index rows of the shard in order, and the rank's rows that it leaves out.
        hidden_dim: numbers in a row of embeddings, over all outputs.
        attributes: rank, world_size, the fingerprint, and everything else that describes the shard.
        residue_dim: numbers in a residue vector, over all layers; 0 if they are not kept.
    """
    residue_dtype = attributes["per_residue"]
    names = ["embeddings", "residues"] if residue_dtype else ["embeddings"]
    with whole_or_absent(path) as temporary:
        with new_hdf5(temporary) as file:
            write_attributes(file, attributes)
            file["index_rows"] = rows
            file["quarantined_rows"] = quarantined
            file.write_strings("sequence_ids", index.sequence_records[rows], index.encoded_ids)
            file.reserve("embeddings", (len(rows), hidden_dim), np.float32)
            if residue_dtype:
                offsets = residue_offsets(index, rows)
                file["residue_offsets"] = offsets
                file.reserve("residues", (int(offsets[-1]), residue_dim), residue_dtype)
        with ExitStack() as stack:
            yield ShardWriter([stack.enter_context(RowWriter(temporary, name)) for name in names])


def open_shard(path: Path) -> Shard:
    """Open a shard; raise a SeqmillError if it is missing, truncated, or not a shard."""
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
        names = [*DATASETS[:3], *(RESIDUE_DATASETS if fingerprint.per_residue else ())]
        if missing := [name for name in names if name not in file]:
            raise SeqmillError(f"{path}: lacks {', '.join(missing)}")
        arrays = {"residues": np.empty((0, 0), np.float16), "residue_offsets": np.empty(0, np.int64)}
        return Shard(
            path,
            attributes["rank"],
            attributes["world_size"],
            fingerprint,
            attributes["num_layers"],
            [kind for kind in attributes["computed_by"].split("; ") if kind],
            {name: value for name, value in attributes.items() if name.startswith("audit_")},
            **{**arrays, **{name: map_dataset(path, file[name]) for name in names}},
        )
