"""The index: every record accounted for, every unique sequence tokenized, and the pack plan.

`index_build` writes it; this module is what the stages after it read. Layout of `index.h5`:

    record_ids, record_id_offsets                    UTF-8 bytes (uint8) and int64 (num_records + 1,)
    record_descriptions, record_description_offsets  likewise
    record_lengths     int32 (num_records,)       residues in the cleaned sequence, before any truncation
    record_fates       uint8 (num_records,)       see Fate
    record_rows        int64 (num_records,)       row of the record's unique sequence; -1 if rejected
    tokens             uint8 (num_tokens,)        all unique sequences end to end, cls and eos included
    token_offsets      int64 (num_sequences + 1,)
    sequence_digests   uint8 (num_sequences, 16)  BLAKE2b of the cleaned sequence's tokens
    sequence_records   int64 (num_sequences,)     the first record that has the sequence
    pack_offsets       int64 (num_packs + 1,)     in sequences
    pack_checksums     uint32 (num_packs,)        CRC-32 of the pack's tokens

Unique sequences stand by descending number of tokens, ties by first appearance.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from seqpack.errors import SeqpackError
from seqpack.hdf5 import map_dataset, open_hdf5, read_attributes

INDEX_FORMAT = 2
DIGEST_ROWS = 16 << 20
# Attributes that the embeddings or their order depend on.
POLICIES = ("tokenizer", "letter_policy", "long_sequences", "max_length", "pack_tokens")
# Each dataset's type, and the shape of one of its rows.
DATASETS: dict[str, tuple[type, tuple[int, ...]]] = {
    "record_ids": (np.uint8, ()),
    "record_id_offsets": (np.int64, ()),
    "record_descriptions": (np.uint8, ()),
    "record_description_offsets": (np.int64, ()),
    "record_lengths": (np.int32, ()),
    "record_fates": (np.uint8, ()),
    "record_rows": (np.int64, ()),
    "tokens": (np.uint8, ()),
    "token_offsets": (np.int64, ()),
    "sequence_digests": (np.uint8, (16,)),
    "sequence_records": (np.int64, ()),
    "pack_offsets": (np.int64, ()),
    "pack_checksums": (np.uint32, ()),
}


class Fate(IntEnum):
    """What becomes of an input record; every record has exactly one."""

    EMBEDDED = 0
    TRUNCATED = 1  # embedded from its first max_length residues
    DUPLICATE = 2  # has the embedding of an earlier record with the same sequence
    REJECTED = 3  # left out, with a reason
    QUARANTINED = 4  # left out by the merge, as its embedding is not finite; never in the index


@dataclass(frozen=True)
class Index:
    """An open index. Arrays are memory maps, named and shaped as in the module's description."""

    path: Path
    attributes: dict[str, Any]
    record_ids: np.ndarray
    record_id_offsets: np.ndarray
    record_descriptions: np.ndarray
    record_description_offsets: np.ndarray
    record_lengths: np.ndarray
    record_fates: np.ndarray
    record_rows: np.ndarray
    tokens: np.ndarray
    token_offsets: np.ndarray
    sequence_digests: np.ndarray
    sequence_records: np.ndarray
    pack_offsets: np.ndarray
    pack_checksums: np.ndarray

    @property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of all that the embeddings and their order depend on."""
        return self.attributes["index_digest"]

    @property
    def num_records(self) -> int:
        return len(self.record_rows)

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_records)

    @property
    def num_packs(self) -> int:
        return len(self.pack_checksums)

    @property
    def max_tokens(self) -> int:
        """Tokens in the longest sequence, cls and eos included."""
        return int(self.token_offsets[1])

    def record_id(self, record: int) -> str:
        return _text(self.record_ids, self.record_id_offsets, record)

    def record_description(self, record: int) -> str:
        return _text(self.record_descriptions, self.record_description_offsets, record)

    def sequence_id(self, row: int) -> str:
        """The id of the first record that has the sequence of this row."""
        return self.record_id(int(self.sequence_records[row]))

    def sequence_name(self, row: int) -> str:
        """The sequence of this row for a message: its first record's id and number."""
        return f"{self.sequence_id(row)!r} (record {int(self.sequence_records[row]) + 1})"

    def pack_tokens(self, pack: int) -> np.ndarray:
        """Return the pack's tokens (uint8, a memory map), checked against their checksum."""
        first, last = self.pack_offsets[pack], self.pack_offsets[pack + 1]
        tokens = self.tokens[self.token_offsets[first] : self.token_offsets[last]]
        if zlib.crc32(tokens) != self.pack_checksums[pack]:
            raise SeqpackError(f"{self.path}: the tokens of pack {pack} are damaged; build the index again")
        return tokens

    def pack_lengths(self, pack: int) -> np.ndarray:
        """Return the tokens in each sequence of the pack (int64), descending."""
        first, last = self.pack_offsets[pack], self.pack_offsets[pack + 1]
        return np.diff(self.token_offsets[first : last + 1])


def open_index(path: Path) -> Index:
    """Open `index.h5`.

    Raises:
        SeqpackError: absent, truncated, damaged, not an index, or of another format version.
    """
    with open_hdf5(path, "index") as file:
        attributes = read_attributes(file)
        version = attributes.get("index_format")
        if version != INDEX_FORMAT:
            found = "is not a seqpack index" if version is None else f"has index format {version}"
            raise SeqpackError(f"{path}: {found}; this version reads index format {INDEX_FORMAT}")
        missing = [name for name in DATASETS if name not in file]
        if missing:
            raise SeqpackError(f"{path}: the index lacks {', '.join(missing)}; build it again")
        index = Index(path, attributes, **{name: map_dataset(path, file[name]) for name in DATASETS})
        for name, (dtype, row) in DATASETS.items():
            values = getattr(index, name)
            if values.dtype != np.dtype(dtype) or values.ndim != 1 + len(row) or values.shape[1:] != row:
                raise SeqpackError(f"{path}: {name} has another type or shape; build the index again")
        if index.digest != content_digest(vars(index), attributes):
            raise SeqpackError(f"{path}: the index is damaged: it does not match its own digest; build it again")
    return index


def content_digest(datasets: Mapping[str, np.ndarray | h5py.Dataset], attributes: Mapping[str, Any]) -> str:
    """Digest what embeddings and their order depend on; not where the FASTA lay or how it was compressed.

    Returns:
        SHA-256 (hexadecimal) of the policies and of all datasets but `tokens`, for which
        `sequence_digests` and `pack_checksums` stand.
    """
    policies = {name: attributes[name] for name in POLICIES}
    digest = hashlib.sha256(json.dumps({"index_format": INDEX_FORMAT, **policies}, sort_keys=True).encode())
    for name in sorted(DATASETS):
        if name != "tokens":
            digest.update(name.encode())
            for values in _blocks(datasets[name]):
                digest.update(values)
    return digest.hexdigest()


def _blocks(dataset: np.ndarray | h5py.Dataset) -> Iterator[np.ndarray]:
    for start in range(0, len(dataset), DIGEST_ROWS):
        yield np.ascontiguousarray(dataset[start : start + DIGEST_ROWS])


def _text(blob: np.ndarray, offsets: np.ndarray, row: int) -> str:
    return blob[offsets[row] : offsets[row + 1]].tobytes().decode("utf-8")
