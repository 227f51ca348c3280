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

import zlib
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from seqpack.errors import SeqpackError
from seqpack.hdf5 import map_dataset, open_hdf5, read_attributes

INDEX_FORMAT = 1


class Fate(IntEnum):
    """What becomes of an input record; every record has exactly one."""

    EMBEDDED = 0
    TRUNCATED = 1  # embedded from its first max_length residues
    DUPLICATE = 2  # has the embedding of an earlier record with the same sequence
    REJECTED = 3  # left out, with a reason


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
        SeqpackError: absent, truncated, not an index, or of another format version.
    """
    with open_hdf5(path, "index") as file:
        attributes = read_attributes(file)
        version = attributes.get("index_format")
        if version != INDEX_FORMAT:
            found = "is not a seqpack index" if version is None else f"has index format {version}"
            raise SeqpackError(f"{path}: {found}; this version reads index format {INDEX_FORMAT}")
        names = [name for name in Index.__dataclass_fields__ if name not in ("path", "attributes")]
        missing = [name for name in names if name not in file]
        if missing:
            raise SeqpackError(f"{path}: the index lacks {', '.join(missing)}; build it again")
        return Index(path, attributes, **{name: map_dataset(path, file[name]) for name in names})


def _text(blob: np.ndarray, offsets: np.ndarray, row: int) -> str:
    return blob[offsets[row] : offsets[row + 1]].tobytes().decode("utf-8")
