"""The letter policy: which letters a sequence may have, which are changed, and which are refused."""

import string
from dataclasses import dataclass, field, replace

from seqmill.errors import SeqmillError
from seqmill.spec.families import ESM2, ESMC, PROSTT5, PROTT5
from seqmill.spec.models import DEFAULT_MODEL

LAYOUT = b" \t\r\n\v\f"  # white space between letters, which is dropped
INVALID = 255

AMBIGUOUS_BASES = "NRYSWKMBDHV"  # IUPAC-IUB 1984, doi:10.1093/nar/13.9.3021
PROTEIN_ONLY = "EFILPQJOZ"  # amino-acid letters that are no IUPAC codes of bases; X has its own message
MIN_NUCLEOTIDE_SAMPLE, MAX_OTHERS_IN_NUCLEOTIDES = 200, 0.02
MIN_PROTEIN_SAMPLE = 20


def _table(letters: str, first: int) -> bytes:
    table = bytearray([INVALID] * 256)
    for token, letter in enumerate(letters, start=first):
        table[ord(letter)] = token
    return bytes(table)


@dataclass
class LetterCounts:
    """Numbers of letters changed, over all records."""

    lower_case: int = 0
    trailing_stop: int = 0
    inner_stop_to_x: int = 0
    j_to_x: int = 0


@dataclass
class T5LetterCounts(LetterCounts):
    """The same for ProtT5 and ProstT5, whose authors replace four more letters."""

    uzob_to_x: int = 0


@dataclass(frozen=True)
class Alphabet:
    """A protein model's tokens, each one byte."""

    tokens: bytes  # from an upper-case ASCII letter to its token
    before: bytes  # special tokens before a sequence
    after: bytes
    policy: str  # in the index digest
    rare: bytes = b""  # letters that become X as J does
    counts: type[LetterCounts] = LetterCounts


# fair-esm's "ESM-1b" alphabet, which ESM-2 and ESM C use: cls, pad, eos, unk, then the letters, null, mask.
ESM2_LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO"
ESM2_ALPHABET = Alphabet(
    _table(ESM2_LETTERS, first=4),
    before=bytes([0]),
    after=bytes([2]),
    policy="upper-case; strip one trailing *; J and inner * to X; refuse gaps and all else",
)
# ProtT5's SentencePiece model: pad, eos, unk, then the letters. ProstT5 adds lower-case letters for structures, and a
# token that says that amino acids follow.
T5_LETTERS = "ALGVSREDTIPKFQNYMHWCX"
T5_POLICY = "upper-case; strip one trailing *; J, U, Z, O, B, and inner * to X; refuse gaps and all else"
AA2FOLD = 149
PROTT5_ALPHABET = Alphabet(_table(T5_LETTERS, first=3), b"", bytes([1]), T5_POLICY, b"UZOB", T5LetterCounts)
PROSTT5_ALPHABET = replace(PROTT5_ALPHABET, before=bytes([AA2FOLD]))
ALPHABETS = {ESM2: ESM2_ALPHABET, ESMC: ESM2_ALPHABET, PROTT5: PROTT5_ALPHABET, PROSTT5: PROSTT5_ALPHABET}


class ProteinLetters:
    """Turns the lines of a protein record into tokens, and counts every replacement.

    Letters become upper case; one trailing `*` is stripped; `J` (leucine or isoleucine), inner `*`, and the alphabet's
    rare letters become `X`; gaps and everything else are refused.
    """

    def __init__(self, alphabet: Alphabet = ESM2_ALPHABET) -> None:
        self.alphabet, self.counts = alphabet, alphabet.counts()

    def tokens(self, body: bytes) -> bytes:
        """Return one token id (uint8) per residue, without special tokens, from a record's lines with their line ends.

        Raise a SeqmillError if there is no residue or a letter is refused; the caller adds file and record.
        """
        tokens = body.translate(self.alphabet.tokens, LAYOUT)
        if tokens and INVALID not in tokens:
            return tokens
        return self._clean(body.translate(None, LAYOUT)).translate(self.alphabet.tokens)

    def _clean(self, letters: bytes) -> bytes:
        upper = letters.upper().removesuffix(b"*")
        if not upper:
            raise SeqmillError("it has no sequence; remove it")
        rare = self.alphabet.rare
        cleaned = upper.translate(bytes.maketrans(b"*J" + rare, b"X" * (2 + len(rare))))
        tokens = cleaned.translate(self.alphabet.tokens)
        position = tokens.find(INVALID)
        if position >= 0:
            raise SeqmillError(_refusal(letters[position], f"at residue {position + 1} is not an amino-acid letter"))
        self.counts.trailing_stop += len(letters) - len(upper)
        self.counts.lower_case += len(letters) - len(letters.translate(None, string.ascii_lowercase.encode()))
        self.counts.inner_stop_to_x += upper.count(b"*")
        self.counts.j_to_x += upper.count(b"J")
        if isinstance(self.counts, T5LetterCounts):
            self.counts.uzob_to_x += len(upper) - len(upper.translate(None, rare))
        return cleaned


def _refusal(byte: int, reason: str) -> str:
    letter = chr(byte)
    shown = repr(letter) if letter.isprintable() and byte < 128 else f"byte 0x{byte:02x}"
    message = f"{shown} {reason}"
    if letter in "-.":
        return f"{message}: this looks like an alignment; remove the gaps (e.g. with seqkit seq -g)"
    if letter.isdigit():
        return f"{message}: remove numbers and positions from the sequence"
    return message


@dataclass
class NucleotideCounts:
    """Numbers of letters changed (lower case, U) or kept but unknown to the tokenizer, over all records."""

    lower_case: int = 0
    u_to_t: int = 0
    n: int = 0
    other_iupac: int = 0


@dataclass
class NucleotideLetters:
    """Turns the lines of a nucleotide record into bases, and counts every change and every ambiguous base.

    Letters become upper case; `U` becomes `T`; `N` and the other IUPAC codes are kept; gaps and everything else are
    refused.
    """

    counts: NucleotideCounts = field(default_factory=NucleotideCounts)

    policy = "upper-case; U to T; keep N and other IUPAC codes; refuse gaps and all else"

    def clean(self, body: bytes) -> bytes:
        """Return the bases, ACGT and IUPAC codes, one byte each, from a record's lines with their line ends.

        Raise a SeqmillError if there is no base or a letter is refused; the caller adds file and record.
        """
        bases = body.translate(_BASES_ONLY, LAYOUT)
        if bases and INVALID not in bases:
            return bases
        return self._clean(body.translate(None, LAYOUT))

    def _clean(self, letters: bytes) -> bytes:
        if not letters:
            raise SeqmillError("it has no sequence; remove it")
        upper = letters.upper()
        position = upper.translate(_NUCLEOTIDES_ONLY).find(INVALID)
        if position >= 0:
            raise SeqmillError(_refusal_of_nucleotide(letters[position], position + 1))
        self.counts.lower_case += len(letters) - len(letters.translate(None, string.ascii_lowercase.encode()))
        self.counts.u_to_t += upper.count(b"U")
        self.counts.n += upper.count(b"N")
        self.counts.other_iupac += len(upper.translate(None, b"ACGTUN"))
        return upper.replace(b"U", b"T")


def _only(letters: str) -> bytes:
    return bytes(byte if byte in letters.encode() else INVALID for byte in range(256))


_BASES_ONLY = _only("ACGT")
_NUCLEOTIDES_ONLY = _only("ACGTU" + AMBIGUOUS_BASES)


def _refusal_of_nucleotide(byte: int, position: int) -> str:
    message = _refusal(byte, f"at base {position} is not a nucleotide letter")
    letter = chr(byte).upper()
    if letter == "X":
        return (
            f"{message}: if it masks a base, write N; if this is a protein, use a protein model, e.g. {DEFAULT_MODEL}"
        )
    if letter in PROTEIN_ONLY:
        return f"{message}: this looks like a protein; use a protein model, e.g. {DEFAULT_MODEL}"
    return message


def looks_like_nucleotides(letters: bytes) -> bool:
    """Return whether supposed proteins are DNA or RNA: there are 200 letters or more, and at least 98 % are ACGTUN.

    In proteins these letters are 26 % of the residues (UniProtKB/Swiss-Prot: A 8.3, C 1.4, G 7.1, T 5.4, N 4.1), and
    even low-complexity proteins have others; in genomes other IUPAC codes are far below 2 %. A shorter sample may be a
    peptide. `letters` are sequences of any number of records, end to end; case and white space do not matter.
    """
    sample = letters.translate(None, LAYOUT).upper()
    others = len(sample.translate(None, b"ACGTUN"))
    return len(sample) >= MIN_NUCLEOTIDE_SAMPLE and others <= MAX_OTHERS_IN_NUCLEOTIDES * len(sample)


def looks_like_protein(letters: bytes) -> bool:
    """Return whether supposed nucleotides are protein: there are 20 letters or more, and less than half are ACGTU.

    This detects proteins that have only IUPAC letters. Among the residues with such letters except N, A, C, G and T are
    36 % (the same release); nucleotides with more ambiguity codes than bases would be useless to a model. N does not
    count: it is asparagine in one alphabet and a gap of any length in the other. A shorter sample may be a degenerate
    primer. `letters` are sequences of any number of records, end to end; case and white space do not matter.
    """
    # Illegal characters do not count either and have their own messages: gaps, X for masked bases, numbers.
    sample = letters.translate(None, LAYOUT).upper().translate(None, b"NX-.*0123456789")
    others = len(sample.translate(None, b"ACGTU"))
    return len(sample) >= MIN_PROTEIN_SAMPLE and 2 * others > len(sample)
