"""The letter policy: which letters a sequence may hold, and what is done with the others."""

from __future__ import annotations

import string
from dataclasses import dataclass, field

from seqpack.errors import SeqpackError

LAYOUT = b" \t\r\n\v\f"  # white space lays a sequence out; it is not part of it
INVALID = 255

# fair-esm's "ESM-1b" alphabet, as indexed by ESM-2: cls, pad, eos, unk, then the letters, null, mask.
ESM2_LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO"
ESM2_FIRST_LETTER_TOKEN = 4


@dataclass(frozen=True)
class Tokenizer:
    """One token per letter, framed by a start and an end token.

    Attributes:
        name: as recorded in the index.
        table: 256 bytes, from an upper-case ASCII letter to its token id, INVALID elsewhere.
        cls, eos: the framing token ids.
    """

    name: str
    table: bytes
    cls: int
    eos: int


def _table(letters: str, first: int) -> bytes:
    table = bytearray([INVALID] * 256)
    for token, letter in enumerate(letters, start=first):
        table[ord(letter)] = token
    return bytes(table)


ESM2_TOKENIZER = Tokenizer("esm2", _table(ESM2_LETTERS, ESM2_FIRST_LETTER_TOKEN), cls=0, eos=2)


@dataclass
class LetterCounts:
    """How many letters the policy has changed, over all records."""

    lower_case: int = 0
    trailing_stop: int = 0
    inner_stop_to_x: int = 0
    j_to_x: int = 0


@dataclass
class ProteinLetters:
    """Turn the lines of a protein record into tokens, counting every replacement.

    Upper-case; one trailing `*` stripped; `J` (leucine or isoleucine) and inner `*` become `X`;
    gaps and everything else are refused.
    """

    tokenizer: Tokenizer = ESM2_TOKENIZER
    counts: LetterCounts = field(default_factory=LetterCounts)

    policy = "upper-case; strip one trailing *; J and inner * to X; refuse gaps and all else"

    def tokens(self, body: bytes) -> bytes:
        """Return one token id per residue, without the framing tokens.

        Args:
            body: the lines of the record's sequence, line ends included.

        Raises:
            SeqpackError: no residue, or a letter that is refused; the message lacks file and record.
        """
        tokens = body.translate(self.tokenizer.table, LAYOUT)
        if tokens and INVALID not in tokens:
            return tokens
        return self._clean(body.translate(None, LAYOUT)).translate(self.tokenizer.table)

    def _clean(self, letters: bytes) -> bytes:
        upper = letters.upper()
        if upper.endswith(b"*"):
            upper = upper[:-1]
            self.counts.trailing_stop += 1
        if not upper:
            raise SeqpackError("it has no sequence")
        self.counts.lower_case += len(letters) - len(letters.translate(None, string.ascii_lowercase.encode()))
        self.counts.inner_stop_to_x += upper.count(b"*")
        self.counts.j_to_x += upper.count(b"J")
        cleaned = upper.replace(b"*", b"X").replace(b"J", b"X")
        tokens = cleaned.translate(self.tokenizer.table)
        position = tokens.find(INVALID)
        if position >= 0:
            raise SeqpackError(_refusal(letters[position], position + 1))
        return cleaned


def _refusal(byte: int, position: int) -> str:
    letter = chr(byte)
    shown = repr(letter) if letter.isprintable() and byte < 128 else f"byte 0x{byte:02x}"
    message = f"{shown} at residue {position} is not an amino-acid letter"
    if letter in "-.":
        return f"{message}: this looks like an alignment; remove the gaps (e.g. with seqkit seq -g)"
    if letter.isdigit():
        return f"{message}: sequences must not hold numbers or positions"
    return message
