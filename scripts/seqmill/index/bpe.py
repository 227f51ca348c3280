"""The nucleotide tokenizer: byte pairs, as defined by the `tokenizer.json` that comes with the model."""

from __future__ import annotations  # proteins need no tokenizers

import hashlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from seqmill.base.commands import command
from seqmill.errors import SeqmillError
from seqmill.spec.models import NAMES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CLS, SEP = "[CLS]", "[SEP]"
MAX_IDS = 65_535  # tokens are stored as uint16
BATCH_BYTES = 4 << 20  # inside the library an encoding takes about 100 bytes per token, or 20 per base
BATCHES_AT_ONCE = 2  # keeps the library's cores busy while the other thread works in Python


class BpeTokenizer:
    """Byte-pair encoding with the `tokenizers` library, every sequence framed by CLS and SEP.

    The library uses all cores available to the process, or RAYON_NUM_THREADS. It merges with a heap, so the time per
    base grows with the logarithm of the sequence's length: 2.5 times from 10 kb to 1 Mb.
    """

    name = "bpe"

    def __init__(self, path: Path, digest: str, tokenizer: Tokenizer) -> None:
        self.path = path  # of the tokenizer.json
        self.digest = digest  # hexadecimal SHA-256 of the file
        self._tokenizer = tokenizer
        self.vocabulary = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self._cls, self._sep = tokenizer.token_to_id(CLS), tokenizer.token_to_id(SEP)

    @classmethod
    def from_file(cls, path: Path, vocabulary: int | None = None) -> BpeTokenizer:
        """Load a `tokenizer.json`, with truncation, padding and dropout switched off.

        Raise a SeqmillError if the file is unreadable or not a BPE tokenizer, does not frame with CLS and SEP, has no
        token for unknown letters, has an id twice, or more ids than uint16 or the model (`vocabulary`) can take.
        """
        from tokenizers import Tokenizer
        from tokenizers.models import BPE

        try:
            stored = path.read_bytes()
        except FileNotFoundError:
            remedy = "copy the one that came with the model"
            if path.parent.name in NAMES:
                remedy = f"run `{command('fetch', path.parent.name)}`"
            raise SeqmillError(f"{path}: no such tokenizer; {remedy}") from None
        except OSError as error:
            raise SeqmillError(f"{path}: cannot be read: {error.strerror or error}") from error
        try:
            tokenizer = Tokenizer.from_buffer(stored)
        except BaseException as error:  # some damage makes the library panic, which is no Exception
            if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
                raise
            raise SeqmillError(
                f"{path}: not a tokenizer.json that the tokenizers library can read ({error}); copy it again from "
                "the source of the model's weights"
            ) from error
        if not isinstance(tokenizer.model, BPE):
            raise SeqmillError(f"{path}: it is {type(tokenizer.model).__name__}; DNABERT-S needs a BPE tokenizer")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.model.dropout = None  # for training only: equal sequences must give equal tokens
        _check(path, tokenizer, vocabulary)
        return cls(path, hashlib.sha256(stored).hexdigest(), tokenizer)

    def encode(self, sequences: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize sequences of upper-case letters (`NucleotideLetters.clean`), each framed by CLS and SEP.

        Return the tokens of all sequences end to end (uint16), and their number in each, int32 (number of sequences,).
        """
        with ThreadPoolExecutor(BATCHES_AT_ONCE) as threads:
            batches = list(threads.map(self._encode, _batches(sequences)))
        if not batches:
            return np.empty(0, np.uint16), np.empty(0, np.int32)
        tokens, num_tokens = zip(*batches, strict=True)
        return np.concatenate(tokens), np.concatenate(num_tokens)

    def _encode(self, sequences: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        texts = [sequence.decode("ascii") for sequence in sequences]
        # CLS and SEP are added here, because the library would copy every encoding to add them.
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        num_tokens = np.fromiter(map(len, encodings), np.int32, len(encodings)) + np.int32(2)
        ends = np.cumsum(num_tokens, dtype=np.int64)
        tokens = np.empty(ends[-1], np.uint16)
        tokens[ends - num_tokens] = self._cls
        tokens[ends - 1] = self._sep
        for encoding, (start, end) in zip(encodings, itertools.pairwise([0, *ends.tolist()]), strict=True):
            tokens[start + 1 : end - 1] = encoding.ids
        return tokens, num_tokens


def _batches(sequences: list[bytes]) -> Iterator[list[bytes]]:
    ends = itertools.accumulate(map(len, sequences))
    for _, batch in itertools.groupby(zip(ends, sequences, strict=True), lambda pair: pair[0] // BATCH_BYTES):
        yield [sequence for _, sequence in batch]


def _check(path: Path, tokenizer: Tokenizer, vocabulary: int | None) -> None:
    known = tokenizer.get_vocab(with_added_tokens=False)
    if len(set(known.values())) < len(known):
        raise SeqmillError(f"{path}: two tokens in its vocabulary have the same id; the file is damaged")
    if tokenizer.model.unk_token not in known:
        raise SeqmillError(f"{path}: it has no unk_token for unknown letters such as N")
    plain = tokenizer.encode("ACGT", add_special_tokens=False).ids
    if tokenizer.encode("ACGT").ids != [tokenizer.token_to_id(CLS), *plain, tokenizer.token_to_id(SEP)]:
        raise SeqmillError(f"{path}: its template does not give {CLS} sequence {SEP}, on which DNABERT-S was trained")
    ids = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    if ids > MAX_IDS:
        raise SeqmillError(f"{path}: it has {ids:,} ids; seqmill stores at most {MAX_IDS:,}")
    if vocabulary is not None and ids > vocabulary:
        raise SeqmillError(
            f"{path}: it has {ids:,} ids and the model knows {vocabulary:,}; "
            "use the tokenizer.json that the weights came with"
        )
