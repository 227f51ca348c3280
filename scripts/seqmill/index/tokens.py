"""From FASTA records to tokens: clean the letters, cut long sequences, apply the model's tokenizer."""

import copy
import hashlib
import itertools
from collections.abc import Callable, Sequence, Sized
from dataclasses import asdict, dataclass

import numpy as np

from seqmill.base.files import read_json
from seqmill.errors import SeqmillError
from seqmill.index.bpe import BpeTokenizer
from seqmill.index.fasta import FastaRecord
from seqmill.index.invalid import InvalidRecords
from seqmill.index.letters import (
    ALPHABETS,
    NucleotideLetters,
    ProteinLetters,
    looks_like_nucleotides,
    looks_like_protein,
)
from seqmill.index.segments import cut, known_bases, weigh, window_spans
from seqmill.spec.families import Family
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import CONFIG, DEFAULT_MODEL, ModelSource

DIGEST_BYTES = 16
GAPPED = 0.1  # records with a larger share of unknown bases are counted


@dataclass(frozen=True)
class Tokenized:
    """A block of records as tokens."""

    lengths: np.ndarray  # int32 (num_records,), residues or bases in the cleaned sequences; 0 if invalid
    digests: bytes  # DIGEST_BYTES per record, of the cleaned sequences
    tokens: bytes  # all records end to end, special tokens included; rejected records may be cut
    num_tokens: np.ndarray  # int64 (num_records,)
    num_segments: np.ndarray  # int32 (num_records,)
    segment_tokens: np.ndarray  # int32 (segments in the block,), tokens in each
    segment_lengths: np.ndarray  # int32 (segments in the block,), weight of each: its residues or known bases


class ProteinTokenizer:
    """One token per residue, framed by special tokens; a sequence is one segment, or one per window."""

    dtype = np.uint8

    def __init__(self, family: Family, policy: LengthPolicy) -> None:
        alphabet = ALPHABETS[family]
        self._letters, self._policy, self._family = ProteinLetters(alphabet), policy, family
        self.name, self.letter_policy = family.name, alphabet.policy  # recorded in the index

    def clean(self, block: list[FastaRecord], name: str, invalid: InvalidRecords) -> list[bytes]:
        """Return the residues of records as tokens; an invalid record has none, and is added to `invalid`.

        Raise a SeqmillError that names the input (`name`) if its first records look like nucleotides.
        """
        if block[0].number == 1 and looks_like_nucleotides(_sample(block)):
            raise SeqmillError(
                f"{name}: the letters are A, C, G, T, U and N: this looks like nucleotides, and the model is "
                "for proteins; translate the sequences, or embed them with dnabert_s"
            )
        return _clean(block, self._letters.tokens, invalid)

    def tokens(self, residues: list[bytes]) -> Tokenized:
        """Tokenize cleaned records."""
        if self._policy.long_sequences == "window":
            segments = [self._windows(sequence) for sequence in residues]
        else:
            kept = self._policy.max_length or None
            segments = [[sequence[:kept]] for sequence in residues]
        flat = list(itertools.chain(*segments))
        lengths, (before, after) = _lengths(flat), (self._letters.alphabet.before, self._letters.alphabet.after)
        tokens = b"".join([before + segment + after for segment in flat])
        return _tokenized(residues, segments, tokens, lengths + np.int32(len(before) + len(after)), lengths)

    def _windows(self, residues: bytes) -> list[bytes]:
        if len(residues) <= self._policy.max_length:
            return [residues]
        spans = window_spans(len(residues), self._policy.window, self._policy.stride)
        return [residues[start:end] for start, end in spans]

    def with_new_counts(self) -> "ProteinTokenizer":
        """Return the same tokenizer with letter counts of its own."""
        return ProteinTokenizer(self._family, self._policy)

    def letter_counts(self) -> dict[str, int]:
        """Return how many letters were changed, or are unknown to the model, so far."""
        return asdict(self._letters.counts)


class NucleotideTokenizer:
    """Byte pairs by the model's own tokenizer.json; a sequence has one segment per window and strand."""

    dtype = np.uint16
    letter_policy = f"{NucleotideLetters.policy}; windows weigh by their known bases"  # in the index digest

    def __init__(self, source: ModelSource, policy: LengthPolicy) -> None:
        assert source.tokenizer is not None
        self._letters, self._policy = NucleotideLetters(), policy
        self._bpe = BpeTokenizer.from_file(source.tokenizer, _vocabulary(source))
        self._gapped = 0
        self.name = f"{self._bpe.name} {self._bpe.digest}"

    def clean(self, block: list[FastaRecord], name: str, invalid: InvalidRecords) -> list[bytes]:
        """Return the bases of records; an invalid record has none, and is added to `invalid`.

        Raise a SeqmillError that names the input (`name`) if its first records look like proteins.
        """
        if block[0].number == 1 and looks_like_protein(_sample(block)):
            raise SeqmillError(
                f"{name}: fewer than half of the letters are A, C, G, T or U: this looks like proteins, and "
                f"the model is for nucleotides; use a protein model, e.g. {DEFAULT_MODEL}"
            )
        return _clean(block, self._letters.clean, invalid)

    def tokens(self, sequences: list[bytes]) -> Tokenized:
        """Tokenize cleaned records."""
        self._gapped += sum(len(one) - known_bases(one) > GAPPED * len(one) for one in sequences)
        segments, weights = zip(*(weigh(self._cut(sequence)) for sequence in sequences), strict=True)
        tokens, segment_tokens = self._bpe.encode(list(itertools.chain(*segments)))
        weights_of_segments = np.fromiter(itertools.chain(*weights), np.int32, len(segment_tokens))
        return _tokenized(sequences, segments, tokens.tobytes(), segment_tokens, weights_of_segments)

    def with_new_counts(self) -> "NucleotideTokenizer":
        """Return the same tokenizer with letter counts of its own."""
        other = copy.copy(self)
        other._letters, other._gapped = NucleotideLetters(), 0
        return other

    def letter_counts(self) -> dict[str, int]:
        """Return how many letters were changed, or are unknown to the model, so far."""
        return {**asdict(self._letters.counts), "records_over_10_percent_unknown": self._gapped}

    def _cut(self, sequence: bytes) -> list[bytes]:
        policy = self._policy
        if policy.max_length and len(sequence) > policy.max_length:
            if policy.long_sequences == "window":
                return cut(sequence, policy.window, policy.stride, policy.strand)
            # A rejected sequence is never computed: one base is enough.
            sequence = sequence[: policy.max_length if policy.long_sequences == "truncate" else 1]
        return cut(sequence, strand=policy.strand)


RecordTokenizer = ProteinTokenizer | NucleotideTokenizer


def make_tokenizer(source: ModelSource, policy: LengthPolicy) -> RecordTokenizer:
    """Return a model's tokenizer."""
    if source.family.is_protein:
        return ProteinTokenizer(source.family, policy)
    return NucleotideTokenizer(source, policy)


def _vocabulary(source: ModelSource) -> int:
    """Return the number of token ids that a model knows."""
    if source.architecture is not None:
        return source.architecture.vocabulary
    assert source.path is not None
    config = source.path / CONFIG
    try:
        return int(read_json(config)["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise SeqmillError(f"{config}: has no usable vocab_size: {error}") from error


def _clean(block: list[FastaRecord], clean: Callable[[bytes], bytes], invalid: InvalidRecords) -> list[bytes]:
    cleaned = []
    for record in block:
        try:
            cleaned.append(clean(record.body))
        except SeqmillError as error:
            invalid.add(record, error)
            cleaned.append(b"")
    return cleaned


def _tokenized(
    sequences: list[bytes],
    segments: Sequence[list[bytes]],
    tokens: bytes,
    segment_tokens: np.ndarray,
    segment_lengths: np.ndarray,
) -> Tokenized:
    num_segments = _lengths(segments)
    ends = np.concatenate(([0], np.cumsum(segment_tokens, dtype=np.int64)))[np.cumsum(num_segments)]
    return Tokenized(
        lengths=_lengths(sequences),
        digests=b"".join(hashlib.blake2b(one, digest_size=DIGEST_BYTES).digest() for one in sequences),
        tokens=tokens,
        num_tokens=np.diff(ends, prepend=0),
        num_segments=num_segments,
        segment_tokens=segment_tokens,
        segment_lengths=segment_lengths,
    )


def _lengths(values: Sequence[Sized]) -> np.ndarray:
    return np.fromiter(map(len, values), np.int32, len(values))


def _sample(block: list[FastaRecord]) -> bytes:
    return b"".join(record.body for record in block)
