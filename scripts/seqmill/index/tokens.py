"""From the lines of records to tokens: letters cleaned, long sequences cut, the model's tokenizer applied."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from seqmill.errors import SeqmillError
from seqmill.index.bpe import BpeTokenizer
from seqmill.index.fasta import SHOWN_ID, FastaRecord
from seqmill.index.letters import NucleotideLetters, ProteinLetters, looks_like_nucleotides, looks_like_protein
from seqmill.index.segments import Segmentation, cut, known_bases, weigh, window_spans
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import DNABERT_S, ModelSource

DIGEST_BYTES = 16
GAPPED = 0.1  # a contig with more unknown bases is counted


@dataclass(frozen=True)
class Tokenized:
    """A block of records as tokens.

    Attributes:
        lengths: int32 (num_records,), residues or bases in the cleaned sequences.
        digests: DIGEST_BYTES a record, of the cleaned sequences.
        tokens: of all records end to end, special tokens included; a record to be rejected may have none.
        num_tokens: int64 (num_records,).
        num_segments: int32 (num_records,).
        segment_tokens: int32 (segments of the block,), tokens in each.
        segment_lengths: int32 (segments of the block,), residues or known bases in each: what it weighs.
    """

    lengths: np.ndarray
    digests: bytes
    tokens: bytes
    num_tokens: np.ndarray
    num_segments: np.ndarray
    segment_tokens: np.ndarray
    segment_lengths: np.ndarray


class RecordTokenizer(Protocol):
    """What the index needs of a family of models.

    Attributes:
        dtype: of the tokens.
        name: of the tokenizer, as recorded.
        letter_policy: in words.
    """

    dtype: type
    name: str
    letter_policy: str

    def __call__(self, block: list[FastaRecord]) -> Tokenized:
        """Tokenize records; a SeqmillError names the record."""

    def letter_counts(self) -> dict[str, int]:
        """How many letters were changed, or are none that the model knows, so far."""


def make_tokenizer(source: ModelSource, fasta: Path, policy: LengthPolicy) -> RecordTokenizer:
    """Return the tokenizer of a model; `fasta` is for messages."""
    return (NucleotideTokenizer if source.family == DNABERT_S else ProteinTokenizer)(source, fasta, policy)


class ProteinTokenizer:
    """A token a residue, framed by cls and eos; a sequence is one segment, or as many as windows."""

    dtype = np.uint8

    def __init__(self, source: ModelSource, fasta: Path, policy: LengthPolicy) -> None:
        self._fasta, self._letters, self._policy = fasta, ProteinLetters(), policy
        self.name = self._letters.tokenizer.name
        self.letter_policy = self._letters.policy

    def __call__(self, block: list[FastaRecord]) -> Tokenized:
        if block[0].number == 1 and looks_like_nucleotides(_sample(block)):
            raise SeqmillError(
                f"{self._fasta}: the letters are A, C, G, T, U and N: this looks like nucleotides, and the model is "
                "one of proteins; translate the sequences, or embed them with dnabert_s"
            )
        cls, eos = bytes([self._letters.tokenizer.cls]), bytes([self._letters.tokenizer.eos])
        residues = _clean(block, self._letters.tokens, self._fasta)
        lengths = np.fromiter(map(len, residues), np.int32, len(residues))
        num_segments = np.ones(len(residues), np.int32)
        if self._policy.long_sequences == "window":
            segments = [self._windows(one) for one in residues]
            num_segments = np.fromiter(map(len, segments), np.int32, len(residues))
            segments = [segment for one in segments for segment in one]
        else:
            kept = self._policy.max_length or None
            segments = [one[:kept] for one in residues]
        segment_lengths = np.fromiter(map(len, segments), np.int32, len(segments))
        ends = np.concatenate(([0], np.cumsum(segment_lengths + 2, dtype=np.int64)))[np.cumsum(num_segments)]
        return Tokenized(
            lengths=lengths,
            digests=_digests(residues),
            tokens=b"".join([cls + segment + eos for segment in segments]),
            num_tokens=np.diff(ends, prepend=0),
            num_segments=num_segments,
            segment_tokens=segment_lengths + np.int32(2),
            segment_lengths=segment_lengths,
        )

    def _windows(self, residues: bytes) -> list[bytes]:
        if len(residues) <= self._policy.max_length:
            return [residues]
        spans = window_spans(len(residues), self._policy.window, self._policy.stride)
        return [residues[start:end] for start, end in spans]

    def letter_counts(self) -> dict[str, int]:
        return asdict(self._letters.counts)


class NucleotideTokenizer:
    """Byte pairs by the model's own tokenizer.json; a sequence is as many segments as windows times strands."""

    dtype = np.uint16

    def __init__(self, source: ModelSource, fasta: Path, policy: LengthPolicy) -> None:
        assert source.tokenizer is not None
        self._fasta, self._letters, self._policy = fasta, NucleotideLetters(), policy
        self._whole = Segmentation(strand=policy.strand)
        self._windows = Segmentation(policy.window, policy.stride, policy.strand)
        self._bpe = BpeTokenizer.from_file(source.tokenizer, _vocabulary(source))
        self._gapped = 0
        self.name = f"{self._bpe.name} {self._bpe.digest}"
        self.letter_policy = f"{self._letters.policy}; windows weigh by their known bases"

    def __call__(self, block: list[FastaRecord]) -> Tokenized:
        if block[0].number == 1 and looks_like_protein(_sample(block)):
            raise SeqmillError(
                f"{self._fasta}: fewer than half of the letters are A, C, G, T or U: this looks like proteins, and "
                "the model is one of nucleotides; use an ESM-2 model"
            )
        sequences = _clean(block, self._letters.clean, self._fasta)
        self._gapped += sum(len(one) - known_bases(one) > GAPPED * len(one) for one in sequences)
        segments, weights = zip(*(weigh(self._cut(sequence)) for sequence in sequences), strict=True)
        num_segments = np.fromiter(map(len, segments), np.int32, len(segments))
        flat = [segment for one in segments for segment in one]
        tokens, segment_tokens = self._bpe.encode(flat)
        ends = np.cumsum(num_segments)
        token_ends = np.concatenate(([0], np.cumsum(segment_tokens, dtype=np.int64)))
        return Tokenized(
            lengths=np.fromiter(map(len, sequences), np.int32, len(sequences)),
            digests=_digests(sequences),
            tokens=tokens.tobytes(),
            num_tokens=np.diff(token_ends[ends], prepend=0),
            num_segments=num_segments,
            segment_tokens=segment_tokens,
            segment_lengths=np.fromiter(itertools.chain(*weights), np.int32, len(flat)),
        )

    def letter_counts(self) -> dict[str, int]:
        return {**asdict(self._letters.counts), "records_over_10_percent_unknown": self._gapped}

    def _cut(self, sequence: bytes) -> list[bytes]:
        policy = self._policy
        if policy.max_length and len(sequence) > policy.max_length:
            if policy.long_sequences == "window":
                return cut(sequence, self._windows)
            # Of what is rejected only the record is kept.
            sequence = sequence[: policy.max_length if policy.long_sequences == "truncate" else 1]
        return cut(sequence, self._whole)


def _vocabulary(source: ModelSource) -> int:
    """Return how many tokens a model knows."""
    if source.architecture is not None:
        return source.architecture.vocabulary
    assert source.path is not None
    config = source.path / "config.json"
    try:
        return int(json.loads(config.read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SeqmillError(f"{config}: has no usable vocab_size: {error}") from error


def _clean(block: list[FastaRecord], clean: Callable[[bytes], bytes], fasta: Path) -> list[bytes]:
    cleaned = []
    for record in block:
        try:
            cleaned.append(clean(record.body))
        except SeqmillError as error:
            raise SeqmillError(f"{fasta}: record {record.number} ({record.id[:SHOWN_ID]!r}): {error}") from None
    return cleaned


def _digests(sequences: list[bytes]) -> bytes:
    return b"".join(hashlib.blake2b(sequence, digest_size=DIGEST_BYTES).digest() for sequence in sequences)


def _sample(block: list[FastaRecord]) -> bytes:
    return b"".join(record.body for record in block)
