"""Reading embeddings.h5 in Python."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from seqmill.base.files import name_errors
from seqmill.base.hdf5 import map_dataset, open_hdf5, read_attributes
from seqmill.errors import SeqmillError
from seqmill.spec.outputs import residue_dataset

EMBEDDINGS_FORMAT = 3
DTYPES = (np.float32, np.float16)
BLOCK_BYTES = 32 << 20
ID_BLOCK = 4096


class EmbeddingsFile:
    """An `embeddings.h5`: the embeddings of a FASTA file, in its order; they stay on disk until they are read.

    `e[3]` and `e[-1]` are vectors (hidden_dim,) in float32, or float16 if so stored; `e[10:20]` and `e[[1, 5]]` are
    arrays (n, hidden_dim). `e["id"]` is the vector of that record; if several records have the id, it is an array
    (n, hidden_dim) of all of them, in the order of the FASTA.

    Attributes:
        ids: the records' ids, a list of str, read when it is first used.
        lengths: int32 (n,), residues in each record's sequence, before any truncation.
        array: (n, hidden_dim), a read-only memory map of all embeddings.
        outputs: layer and pooling of every output in the file.
        layer: that of this output.
        pooling: that of this output.
        attrs: the file's attributes as a dict: model, fingerprint, policies, source.
    """

    def __init__(self, path: str | Path, layer: int | None = None, pooling: str | None = None) -> None:
        """Open a file.

        Args:
            layer: of the output, if the file has several. A negative one counts from the end: -1 is the model's last.
            pooling: of the output. Of several outputs that fit, the first is taken (`outputs` lists them).

        Raises:
            SeqmillError: the file is missing, truncated or not written by seqmill's merge, or has no such output.
        """
        path = self.path = Path(path)
        with open_hdf5(path, "embeddings file") as file:
            self.attrs: dict[str, Any] = read_attributes(file)
            version = self.attrs.get("embeddings_format")
            if version != EMBEDDINGS_FORMAT:
                found = "is not a seqmill embeddings file" if version is None else f"has format {version}"
                raise SeqmillError(f"{path}: {found}; this version reads format {EMBEDDINGS_FORMAT}")
            outputs = json.loads(self.attrs["outputs"])
            datasets = {(output["layer"], output["pooling"]): output["dataset"] for output in outputs}
            self.outputs = list(datasets)
            if layer is not None and layer < 0:
                layer += self.attrs["num_layers"] + 1
            fits = [pair for pair in datasets if layer in (None, pair[0]) and pooling in (None, pair[1])]
            if not fits:
                there = ", ".join(f"layer {layer} pooled by {pooling}" for layer, pooling in datasets)
                raise SeqmillError(f"{path}: has no such output; there is {there}")
            self.layer, self.pooling = fits[0]
            self.array: np.ndarray = map_dataset(path, file[datasets[fits[0]]])
            self.lengths: np.ndarray = file["lengths"][:]
            self._residues: tuple[np.ndarray, ...] | None = None  # vectors, begins and counts
            if self.attrs.get("per_residue"):
                vectors = residue_dataset(self.layer, self.layer == self.outputs[0][0])
                names = (vectors, "residue_begins", "residue_counts")
                self._residues = tuple(map_dataset(path, file[name]) for name in names)
        if self.array.ndim != 2 or self.array.dtype not in DTYPES or self.lengths.dtype != np.int32:
            raise SeqmillError(f"{path}: embeddings or lengths have another type or shape; merge the shards again")
        self._require_one_a_row("lengths", len(self.lengths))

    @property
    def has_residues(self) -> bool:
        """Whether the file also holds residue vectors."""
        return self._residues is not None

    @property
    def residue_bytes(self) -> int:
        """Bytes of the residue vectors of all records, if no records shared them."""
        if self._residues is None:
            return 0
        vectors, _, counts = self._residues
        return int(counts.sum(dtype=np.int64)) * vectors.shape[1] * vectors.itemsize

    def residues(self, key: str | int) -> np.ndarray:
        """Return the residue vectors of a record by the output's layer: (residues, hidden_dim), float16 or float32.

        Args:
            key: the record's id, or its row.

        Raises:
            SeqmillError: the file was made without `per_residue`, or several records with that id differ.
            KeyError, IndexError: there is no such record.
        """
        if self._residues is None:
            raise SeqmillError(f"{self.path}: has no vectors of residues; embed with --config per_residue=float16")
        vectors, begins, counts = self._residues
        if isinstance(key, str):
            rows = self._rows_of(key)
            if len(set(begins[rows].tolist())) > 1:
                raise SeqmillError(f"several sequences have the id {key!r}: use a row instead, one of {rows}")
            key = rows[0]
        begin = int(begins[key])
        return np.array(vectors[begin : begin + int(counts[key])])

    @cached_property
    def ids(self) -> list[str]:
        with open_hdf5(self.path, "embeddings file") as file:
            ids = file["sequence_ids"].asstr()[:].tolist()
        self._require_one_a_row("sequence_ids", len(ids))
        return ids

    def _require_one_a_row(self, name: str, number: int) -> None:
        if number != len(self.array):
            raise SeqmillError(f"{self.path}: {number} {name} of {len(self.array)} embeddings; merge the shards again")

    @cached_property
    def _rows(self) -> dict[str, list[int]]:
        rows: dict[str, list[int]] = {}
        for row, id_ in enumerate(self.ids):
            rows.setdefault(id_, []).append(row)
        return rows

    def _rows_of(self, id_: str) -> list[int]:
        if id_ not in self._rows:
            raise KeyError(f"no record has the id {id_!r} in {self.path}")
        return self._rows[id_]

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (np.array(row) for row in self.array)

    def __contains__(self, id_: object) -> bool:
        return id_ in self._rows

    def __getitem__(self, key: str | int | slice | list[str] | list[int] | np.ndarray) -> np.ndarray:
        if isinstance(key, str):
            rows = self._rows_of(key)
            return np.array(self.array[rows[0] if len(rows) == 1 else rows])
        if isinstance(key, list) and key and all(isinstance(id_, str) for id_ in key):
            return np.array(self.array[[row for id_ in key for row in self._rows_of(str(id_))]])
        return np.array(self.array[key])

    def __repr__(self) -> str:
        warning = f", {self.attrs['warning']}" if self.attrs.get("warning") else ""
        what = f"layer {self.layer}, {self.pooling}"
        return f"<{type(self).__name__} {len(self)} x {self.array.shape[1]} by {self.attrs['model']}, {what}{warning}>"


@dataclass(frozen=True)
class Block:
    """Consecutive records: `start` is the row of the first, `vectors` (n, hidden_dim) in the file's dtype."""

    start: int
    ids: list[str]
    lengths: np.ndarray
    vectors: np.ndarray


def read_blocks(embeddings: EmbeddingsFile) -> Iterator[Block]:
    """Yield all records in order, `BLOCK_BYTES` of vectors at a time; raise a SeqmillError if the file is damaged."""
    array = embeddings.array
    rows = max(BLOCK_BYTES // max(array.shape[1] * array.itemsize, 1), 1)
    with open_hdf5(embeddings.path, "embeddings file") as file:
        ids = file["sequence_ids"].asstr()
        for start in range(0, len(array), rows):
            block = slice(start, min(start + rows, len(array)))
            vectors = read_rows(embeddings, block.start, block.stop)
            yield Block(start, ids[block].tolist(), embeddings.lengths[block], vectors)


def read_rows(embeddings: EmbeddingsFile, start: int, end: int) -> np.ndarray:
    """Return the vectors of some rows, (end - start, hidden_dim) in the file's dtype.

    They are read, not mapped, because the pages of a memory map count as memory of the process.
    """
    array = embeddings.array
    if not isinstance(array, np.memmap):  # a file without rows
        return array[start:end]
    width = array.shape[1]
    offset = array.offset + start * width * array.itemsize
    with name_errors(embeddings.path):
        values = np.fromfile(embeddings.path, array.dtype, (end - start) * width, offset=offset)
    if len(values) != (end - start) * width:
        raise SeqmillError(f"{embeddings.path}: the file became shorter while it was read; merge the shards again")
    return values.reshape(end - start, width)


def read_ids(embeddings: EmbeddingsFile) -> Iterator[str]:
    """Yield all ids in order."""
    with open_hdf5(embeddings.path, "embeddings file") as file:
        ids = file["sequence_ids"].asstr()
        for start in range(0, len(embeddings), ID_BLOCK):
            yield from ids[start : start + ID_BLOCK]


def ids_of(embeddings: EmbeddingsFile, rows: np.ndarray) -> np.ndarray:
    """Return the ids (object) of some rows (int64, in any order) without reading all of them."""
    distinct, places = np.unique(rows, return_inverse=True)
    found = np.empty(len(distinct), object)
    with open_hdf5(embeddings.path, "embeddings file") as file:
        ids = file["sequence_ids"].asstr()
        blocks = distinct // ID_BLOCK
        for block in np.unique(blocks).tolist():
            wanted = blocks == block
            found[wanted] = ids[block * ID_BLOCK : (block + 1) * ID_BLOCK][distinct[wanted] % ID_BLOCK]
    return found[places]
