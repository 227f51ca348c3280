"""Reading the index: the fate of every record, the tokens of every unique sequence, and the pack plan.

`seqmill.index.build` writes it; `index_format` describes its datasets.
"""

import json
import zlib
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from seqmill.base.hdf5 import map_dataset, open_hdf5, read_attributes
from seqmill.base.text_columns import offsets_of, split_bytes, texts_end_to_end
from seqmill.errors import SeqmillError
from seqmill.spec.families import FAMILIES, Family
from seqmill.store.index_format import DATASETS, INDEX_FORMAT, TOKENS, content_digest


@dataclass(frozen=True)
class Index:
    """An open index. Arrays are memory maps, named and shaped as `index_format` says."""

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
    reused_files: np.ndarray
    reused_rows: np.ndarray
    first_number: int = 1  # of the records, in messages

    @property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of everything that the embeddings and their order depend on."""
        return self.attributes["index_digest"]

    @property
    def num_records(self) -> int:
        return len(self.record_rows)

    @property
    def num_invalid(self) -> int:
        """Records that are rejected because they have a letter that is not allowed, or no sequence."""
        return int(self.attributes.get("num_invalid", 0))  # older files have none

    @property
    def family(self) -> Family:
        """The family of models that reads the tokens."""
        name = self.attributes["family"]
        if name not in FAMILIES:
            raise SeqmillError(f"{self.path}: damaged, or of a newer version: no models are of the family {name!r}")
        return FAMILIES[name]

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_records)

    @property
    def num_packs(self) -> int:
        return len(self.pack_checksums)

    @property
    def num_computed(self) -> int:
        """Unique sequences to compute; the rows from here on are reused."""
        return int(self.pack_offsets[-1])

    @cached_property
    def reuse(self) -> list[dict[str, Any]]:
        """The earlier results that vectors are taken from: path, bytes, rows, and the fingerprint with its fields."""
        return json.loads(self.attributes["reuse"])

    @property
    def reused_paths(self) -> list[str]:
        """The paths in `reuse` for messages: bytes that are not UTF-8 are escaped."""
        return [source["path"].encode(errors="backslashreplace").decode() for source in self.reuse]

    def reused_counts(self) -> list[tuple[str, int]]:
        """Return each path in `reuse` and the number of sequences whose vectors are taken from it."""
        counts = np.bincount(self.reused_files, minlength=len(self.reuse)).tolist()
        return [(source["path"], count) for source, count in zip(self.reuse, counts, strict=True)]

    @cached_property
    def max_tokens(self) -> int:
        """Tokens in the longest segment to compute, special tokens included; 2 if there is none."""
        return int(np.diff(self._offsets_of_segments(0, self.num_computed)).max(initial=2))

    @property
    def has_segments(self) -> bool:
        """Whether any sequence has several segments."""
        return len(self.segment_lengths) > 0

    @property
    def is_blended(self) -> bool:
        """Whether segments are windows of proteins, whose residue vectors are blended."""
        return self.has_segments and self.family.is_protein

    @property
    def stride(self) -> int:
        """Residues or bases from the start of a window to the start of the next; 0 without windows."""
        return int(self.attributes["stride"])

    def record_id(self, record: int) -> str:
        begin, end = self.record_id_offsets[record : record + 2]
        return self.record_ids[begin:end].tobytes().decode()

    def record_name(self, record: int) -> str:
        """Return a record's id and number, for messages."""
        return f"{self.record_id(record)!r} (record {record + self.first_number})"

    def sequence_id(self, row: int) -> str:
        """Return the id of the first record with the row's sequence."""
        return self.record_id(int(self.sequence_records[row]))

    def sequence_name(self, row: int) -> str:
        """Return the name of the first record with the row's sequence, for messages."""
        return self.record_name(int(self.sequence_records[row]))

    def encoded_ids(self, records: np.ndarray) -> list[bytes]:
        """Return the ids of many records (int64) as UTF-8, much faster than one by one."""
        return split_bytes(*texts_end_to_end(self.record_ids, self.record_id_offsets, records))

    def pack_tokens(self, pack: int) -> np.ndarray:
        """Return the pack's tokens (uint8 or uint16, a memory map), checked against their checksum."""
        first, last = self.pack_offsets[pack], self.pack_offsets[pack + 1]
        tokens = self.tokens[self.token_offsets[first] : self.token_offsets[last]]
        if zlib.crc32(tokens) != self.pack_checksums[pack]:
            raise SeqmillError(f"{self.path}: the tokens of pack {pack} are damaged; build the index again")
        return tokens

    def pack_lengths(self, pack: int) -> np.ndarray:
        """Return the tokens in each segment of the pack (int64)."""
        return np.diff(self._offsets_of_segments(*self.pack_offsets[pack : pack + 2]))

    def pack_segments(self, pack: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return where each sequence's segments begin in the pack (int64), and the weight of every segment (int32).

        Weights are residues or bases. None if every sequence is one segment, or if segments are blended.
        """
        if not self.has_segments or self.is_blended:
            return None
        first, last = self.pack_offsets[pack : pack + 2]
        begins = self.sequence_segments[first : last + 1]
        return begins[:-1] - begins[0], self.segment_lengths[begins[0] : begins[-1]]

    def pack_windows(self, pack: int) -> np.ndarray | None:
        """Return where each sequence's windows begin among the pack's segments, and the end (int64).

        None if no sequence of the pack has several windows to blend.
        """
        if not self.is_blended:
            return None
        first, last = self.pack_offsets[pack : pack + 2]
        begins = self.sequence_segments[first : last + 1]
        return begins - begins[0] if begins[-1] - begins[0] > last - first else None

    def first_segment(self, pack: int) -> int:
        """Return the number of the pack's first segment in the index."""
        return self.first_segment_of(int(self.pack_offsets[pack]))

    def first_segment_of(self, row: int) -> int:
        """Return the number of a sequence's first segment in the index."""
        return int(self.sequence_segments[row]) if self.has_segments else row

    def row_of_segment(self, segment: int) -> int:
        """Return the row of a segment's sequence."""
        if not self.has_segments:
            return segment
        return int(np.searchsorted(self.sequence_segments, segment, side="right")) - 1

    def row_segments(self, row: int) -> list[np.ndarray]:
        """Return the tokens of each segment of a sequence."""
        return [self.tokens[begin:end] for begin, end in pairwise(self._offsets_of_segments(row, row + 1).tolist())]

    def row_weights(self, row: int) -> np.ndarray:
        """Return the residues or bases (int32) in each segment of a sequence; 1 if it has only one."""
        if not self.has_segments:
            return np.ones(1, np.int32)
        return self.segment_lengths[self.sequence_segments[row] : self.sequence_segments[row + 1]]

    def _offsets_of_segments(self, first_row: int, last_row: int) -> np.ndarray:
        """Return where in `tokens` the segments of the sequences first_row to last_row - 1 begin, and the end."""
        if not self.has_segments:
            return self.token_offsets[first_row : last_row + 1]
        first, last = self.sequence_segments[first_row], self.sequence_segments[last_row]
        return self.segment_offsets[first : last + 1]


def embedded_lengths(index: Index, records: np.ndarray) -> np.ndarray:
    """Return how many residues or bases of each of these records (int64) enter the model, int64."""
    lengths = index.record_lengths[records].astype(np.int64)
    if index.attributes["long_sequences"] == "truncate":
        lengths = np.minimum(lengths, index.attributes["max_length"])
    return lengths


def residue_counts(index: Index, rows: np.ndarray) -> np.ndarray:
    """Return how many residues of each of these rows' (int64) proteins enter the model, int64."""
    return embedded_lengths(index, index.sequence_records[rows])


def residue_offsets(index: Index, rows: np.ndarray) -> np.ndarray:
    """Return where each row's residues begin if all are put end to end, and the end: int64 (n + 1,)."""
    return offsets_of(residue_counts(index, rows))


def open_index(path: Path) -> Index:
    """Open `index.h5`; raise a SeqmillError if it is missing, damaged, not an index, or of another format version."""
    with open_hdf5(path, "index") as file:
        attributes = read_attributes(file)
        version = attributes.get("index_format")
        if version != INDEX_FORMAT:
            found = "is not a seqmill index" if version is None else f"has index format {version}"
            raise SeqmillError(f"{path}: {found}; this version reads index format {INDEX_FORMAT}")
        if missing := [name for name in DATASETS if name not in file]:
            raise SeqmillError(f"{path}: the index lacks {', '.join(missing)}; build it again")
        arrays: dict[str, Any] = {name: map_dataset(path, file[name]) for name in DATASETS}
        index = Index(path, attributes, **arrays)
        for name, (dtype, row) in DATASETS.items():
            values = getattr(index, name)
            dtypes = TOKENS if name == "tokens" else (dtype,)
            if values.dtype not in dtypes or values.ndim != 1 + len(row) or values.shape[1:] != row:
                raise SeqmillError(f"{path}: {name} has another type or shape; build the index again")
        if index.digest != content_digest(vars(index), attributes):
            raise SeqmillError(f"{path}: the index is damaged: it does not match its own digest; build it again")
    return index
