"""The index: every record accounted for, every unique sequence tokenized, and the pack plan.

`index_build` writes it; this module is what the stages after it read. Layout of `index.h5`:

    record_ids, record_id_offsets                    UTF-8 bytes (uint8) and int64 (num_records + 1,)
    record_descriptions, record_description_offsets  likewise
    record_lengths     int32 (num_records,)       residues or bases in the cleaned sequence, before any truncation
    record_fates       uint8 (num_records,)       see Fate
    record_rows        int64 (num_records,)       row of the record's unique sequence; -1 if rejected
    tokens             uint8 or uint16 (num_tokens,)  all unique sequences end to end, special tokens included
    token_offsets      int64 (num_sequences + 1,)
    sequence_digests   uint8 (num_sequences, 16)  BLAKE2b of the cleaned sequence (of a protein: of its tokens)
    sequence_records   int64 (num_sequences,)     the first record that has the sequence
    pack_offsets       int64 (num_packs + 1,)     in sequences
    pack_checksums     uint32 (num_packs,)        CRC-32 of the pack's tokens
    sequence_segments  int64 (num_sequences + 1,) where each sequence's segments begin
    segment_offsets    int64 (num_segments + 1,)  where each segment's tokens begin
    segment_lengths    int32 (num_segments,)      residues in it, or known bases (ACGT): what it weighs

Unique sequences stand by descending number of tokens, ties by first appearance. A segment is what goes through
the model by itself: a window of a long contig, on one strand. Where every sequence is one segment the last three
datasets are empty.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from seqpack.errors import SeqpackError
from seqpack.hdf5 import map_dataset, open_hdf5, read_attributes
from seqpack.models.registry import ESM2

INDEX_FORMAT = 3
DIGEST_ROWS = 16 << 20
# Attributes that the embeddings or their order depend on.
POLICIES = (
    "tokenizer",
    "letter_policy",
    "long_sequences",
    "max_length",
    "window",
    "stride",
    "strand",
    "pack_tokens",
)
TOKENS = (np.uint8, np.uint16)  # of letters; of a vocabulary of thousands
# Each dataset's type, and the shape of one of its rows. `tokens` may be of the other type of TOKENS.
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
    "sequence_segments": (np.int64, ()),
    "segment_offsets": (np.int64, ()),
    "segment_lengths": (np.int32, ()),
}


class Fate(IntEnum):
    """What becomes of an input record; every record has exactly one."""

    EMBEDDED = 0
    TRUNCATED = 1  # embedded from its first max_length residues
    DUPLICATE = 2  # has the embedding of an earlier record with the same sequence
    REJECTED = 3  # left out, with a reason
    QUARANTINED = 4  # left out by the merge, as its embedding is not finite; never in the index
    WINDOWED = 5  # longer than max_length: embedded in windows


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
    sequence_segments: np.ndarray
    segment_offsets: np.ndarray
    segment_lengths: np.ndarray

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

    @cached_property
    def max_tokens(self) -> int:
        """Tokens in the longest segment, special tokens included."""
        return int(np.diff(self.segment_offsets).max()) if self.has_segments else int(self.token_offsets[1])

    @property
    def has_segments(self) -> bool:
        """Whether any sequence is more than one segment."""
        return len(self.segment_lengths) > 0

    def record_id(self, record: int) -> str:
        return _text(self.record_ids, self.record_id_offsets, record)

    def record_description(self, record: int) -> str:
        return _text(self.record_descriptions, self.record_description_offsets, record)

    def ids_of(self, records: np.ndarray) -> list[str]:
        """Return the ids of many records (int64), much faster than one by one."""
        return _texts(self.record_ids, self.record_id_offsets, records)

    def descriptions_of(self, records: np.ndarray) -> list[str]:
        """Return the descriptions of many records (int64)."""
        return _texts(self.record_descriptions, self.record_description_offsets, records)

    def sequence_ids_of(self, rows: np.ndarray) -> list[str]:
        """Return for many rows (int64) the id of the first record that has the row's sequence."""
        return self.ids_of(self.sequence_records[rows])

    def sequence_id(self, row: int) -> str:
        """The id of the first record that has the sequence of this row."""
        return self.record_id(int(self.sequence_records[row]))

    def sequence_name(self, row: int) -> str:
        """The sequence of this row for a message: its first record's id and number."""
        return f"{self.sequence_id(row)!r} (record {int(self.sequence_records[row]) + 1})"

    def pack_tokens(self, pack: int) -> np.ndarray:
        """Return the pack's tokens (uint8 or uint16, a memory map), checked against their checksum."""
        first, last = self.pack_offsets[pack], self.pack_offsets[pack + 1]
        tokens = self.tokens[self.token_offsets[first] : self.token_offsets[last]]
        if zlib.crc32(tokens) != self.pack_checksums[pack]:
            raise SeqpackError(f"{self.path}: the tokens of pack {pack} are damaged; build the index again")
        return tokens

    def pack_lengths(self, pack: int) -> np.ndarray:
        """Return the tokens in each segment of the pack (int64)."""
        return np.diff(self._offsets_of_segments(*self.pack_offsets[pack : pack + 2]))

    def pack_segments(self, pack: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return where each sequence's segments begin in the pack (int64), and the weight of every segment.

        The weights are residues or bases (int32). None if every sequence is one segment, or is blended of its own.
        """
        if not self.has_segments or self.is_blended:
            return None
        first, last = self.pack_offsets[pack : pack + 2]
        begins = self.sequence_segments[first : last + 1]
        return begins[:-1] - begins[0], self.segment_lengths[begins[0] : begins[-1]]

    @property
    def is_blended(self) -> bool:
        """Whether segments are windows of proteins, whose residues are blended."""
        return self.has_segments and self.attributes["family"] == ESM2

    @property
    def stride(self) -> int:
        """Residues or bases from the beginning of a window to that of the next; 0 without windows."""
        return int(self.attributes["stride"])

    def pack_windows(self, pack: int) -> np.ndarray | None:
        """Return where each sequence's windows begin among the pack's segments, and the end (int64).

        None if no sequence of the pack is to be blended of several.
        """
        if not self.is_blended:
            return None
        first, last = self.pack_offsets[pack : pack + 2]
        begins = self.sequence_segments[first : last + 1]
        return begins - begins[0] if begins[-1] - begins[0] > last - first else None

    def first_segment(self, pack: int) -> int:
        """Return the number of the pack's first segment among all."""
        first = self.pack_offsets[pack]
        return int(self.sequence_segments[first]) if self.has_segments else int(first)

    def row_of_segment(self, segment: int) -> int:
        """Return the row of the sequence that a segment is of."""
        if not self.has_segments:
            return segment
        return int(np.searchsorted(self.sequence_segments, segment, side="right")) - 1

    def row_segments(self, row: int) -> list[np.ndarray]:
        """Return the tokens of each of a sequence's segments."""
        return [self.tokens[begin:end] for begin, end in pairwise(self._offsets_of_segments(row, row + 1).tolist())]

    def row_weights(self, row: int) -> np.ndarray:
        """Return the residues or bases (int32) in each of a sequence's segments; 1 where it is but one."""
        if not self.has_segments:
            return np.ones(1, np.int32)
        return self.segment_lengths[self.sequence_segments[row] : self.sequence_segments[row + 1]]

    def _offsets_of_segments(self, first_row: int, last_row: int) -> np.ndarray:
        """Return where the segments of the sequences first_row to last_row - 1 begin and the last ends, in tokens."""
        if not self.has_segments:
            return self.token_offsets[first_row : last_row + 1]
        first, last = self.sequence_segments[first_row], self.sequence_segments[last_row]
        return self.segment_offsets[first : last + 1]


def residue_counts(index: Index, rows: np.ndarray) -> np.ndarray:
    """Return how many residues of each of these rows' (int64) sequences enter the model, int64; of proteins."""
    return embedded_lengths(index, index.sequence_records[rows])


def residue_offsets(index: Index, rows: np.ndarray) -> np.ndarray:
    """Return where the residues of each of these rows begin if they lie end to end, and the end: int64 (n + 1,)."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(residue_counts(index, rows))))


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
            dtypes = TOKENS if name == "tokens" else (dtype,)
            if values.dtype not in dtypes or values.ndim != 1 + len(row) or values.shape[1:] != row:
                raise SeqpackError(f"{path}: {name} has another type or shape; build the index again")
        if index.digest != content_digest(vars(index), attributes):
            raise SeqpackError(f"{path}: the index is damaged: it does not match its own digest; build it again")
    return index


def embedded_lengths(index: Index, records: np.ndarray) -> np.ndarray:
    """Return how many residues or bases of each of these records (int64) enter the model, int64."""
    lengths = index.record_lengths[records].astype(np.int64)
    if index.attributes["long_sequences"] == "truncate":
        lengths = np.minimum(lengths, index.attributes["max_length"])
    return lengths


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


def _texts(blob: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> list[str]:
    view = memoryview(np.asarray(blob))
    starts, ends = offsets[rows].tolist(), offsets[np.asarray(rows) + 1].tolist()
    return [str(view[start:end], "utf-8") for start, end in zip(starts, ends, strict=True)]
