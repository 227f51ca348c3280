"""The records seen by the pass over the input: text and tokens in temporary files, small columns in memory."""

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import IO

import numpy as np

from seqmill.base.text_columns import offsets_of
from seqmill.index.fasta import FastaRecord
from seqmill.index.invalid import InvalidRecords
from seqmill.index.tokens import DIGEST_BYTES, RecordTokenizer, Tokenized


@dataclass
class Spill:
    """A growing column of variable-length values: bytes in a file, their lengths in memory."""

    file: IO[bytes]
    lengths: list[np.ndarray] = field(default_factory=list)

    def append(self, data: bytes, lengths: np.ndarray) -> None:
        self.file.write(data)
        self.lengths.append(lengths)

    def append_texts(self, texts: list[str]) -> None:
        values = [text.encode() for text in texts]
        self.append(b"".join(values), np.fromiter(map(len, values), np.int64, len(values)))

    def offsets(self) -> np.ndarray:
        """Return int64 (n + 1,)."""
        return offsets_of(np.concatenate(self.lengths))

    def mapped(self, dtype: type = np.uint8) -> np.ndarray:
        """Return the whole column, as a memory map unless the file is in memory."""
        if isinstance(self.file, io.BytesIO):
            return np.frombuffer(self.file.getbuffer(), dtype)
        self.file.flush()
        size = self.file.tell() // np.dtype(dtype).itemsize
        return np.memmap(self.file, dtype, mode="r", shape=(size,)) if size else np.empty(0, dtype)


@dataclass
class Records:
    """All records, in input order; the lists hold one array per block."""

    ids: Spill
    descriptions: Spill
    tokens: Spill
    lengths: list[np.ndarray] = field(default_factory=list)
    digests: bytearray = field(default_factory=bytearray)
    num_segments: list[np.ndarray] = field(default_factory=list)
    segment_tokens: list[np.ndarray] = field(default_factory=list)
    segment_lengths: list[np.ndarray] = field(default_factory=list)

    def read(
        self, blocks: Iterable[list[FastaRecord]], name: str, tokenizer: RecordTokenizer, on_invalid: str = "fail"
    ) -> InvalidRecords:
        """Tokenize and add the records of an input, `name`; return the invalid ones.

        Invalid records are added, too, with no letters. With `on_invalid` "fail" nothing is added after the first of
        them: the other records are only checked, which is faster.
        """
        invalid = InvalidRecords()
        for block in blocks:
            sequences = tokenizer.clean(block, name, invalid)
            if on_invalid == "skip" or not invalid.count:
                self._append(block, tokenizer.tokens(sequences))
        return invalid

    def _append(self, block: list[FastaRecord], tokenized: Tokenized) -> None:
        self.digests.extend(tokenized.digests)
        self.lengths.append(tokenized.lengths)
        self.tokens.append(tokenized.tokens, tokenized.num_tokens)
        self.num_segments.append(tokenized.num_segments)
        self.segment_tokens.append(tokenized.segment_tokens)
        self.segment_lengths.append(tokenized.segment_lengths)
        self.ids.append_texts([record.id for record in block])
        self.descriptions.append_texts([record.description for record in block])

    def digest_rows(self) -> np.ndarray:
        """Return the digests of the cleaned sequences, uint8 (num_records, 16)."""
        return np.frombuffer(self.digests, np.uint8).reshape(-1, DIGEST_BYTES)
