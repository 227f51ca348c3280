"""A naive FASTA reader, line by line, with which the fuzz tests compare the package."""

import gzip
import io
import zlib
from dataclasses import dataclass

import zstandard

from seqmill.spec.lengths import LengthPolicy

WHITE = b" \t\r\n\v\f"
LETTERS = b"LAGVSERTIDPKQNFYMHWCXBUZO"
T5_LETTERS = b"ALGVSREDTIPKFQNYMHWCX"  # the others become X
BASES, IUPAC = b"ACGTU", b"RYSWKMBDHVN"
NEITHER = b"NX-.*0123456789"  # they tell nothing about the kind of a sequence


@dataclass
class Said:
    id: str
    description: str
    letters: bytes  # cleaned; none if the record is invalid

    def is_rejected(self, policy: LengthPolicy) -> bool:
        return not self.letters or (policy.long_sequences == "reject" and len(self.letters) > policy.max_length)


def refuses(said: list[Said] | None, policy: LengthPolicy, on_invalid: str) -> bool:
    """Return whether no index can be built."""
    if said is None or (on_invalid == "fail" and not all(one.letters for one in said)):
        return True
    return all(one.is_rejected(policy) for one in said)


@dataclass(frozen=True)
class Tokens:
    """A protein model's tokens, as its authors number them."""

    letters: bytes
    first: int  # token of the first letter; the others follow
    before: list[int]
    after: list[int]


OF_ESM = Tokens(LETTERS, 4, [0], [2])
PROTEIN_MODELS = {
    "untrained:esm2_t6_8M_UR50D": OF_ESM,
    "untrained:esmc_300m": OF_ESM,
    "untrained:prott5_xl_u50": Tokens(T5_LETTERS, 3, [], [1]),
    "untrained:prostt5": Tokens(T5_LETTERS, 3, [149], [1]),
}


def read(text: bytes, nucleotides: bool = False, known: bytes = LETTERS) -> list[Said] | None:
    """Return the records, or None if the text must be refused; legal letters that a model does not know become X."""
    text = text.removeprefix(b"\xef\xbb\xbf").lstrip(WHITE)
    records: list[tuple[bytes, list[bytes]]] = []
    for line in text.split(b"\n"):
        if line.startswith(b">"):
            records.append((line[1:].rstrip(b"\r"), []))
        elif not records:
            return None
        else:
            records[-1][1].append(line)
    bodies = [bytes(byte for byte in b"".join(lines) if byte not in WHITE).upper() for _, lines in records]
    if _is_of_the_other_kind(b"".join(bodies), nucleotides):
        return None
    said = [_one(header, body, nucleotides, known) for (header, _), body in zip(records, bodies, strict=True)]
    return None if None in said else said  # type: ignore[return-value]


def _is_of_the_other_kind(letters: bytes, nucleotides: bool) -> bool:
    if nucleotides:
        told = [byte for byte in letters if byte not in NEITHER]
        bases, others = (sum(is_base == (byte in BASES) for byte in told) for is_base in (1, 0))
        return bases + others >= 20 and bases < others
    others = sum(byte not in BASES + b"N" for byte in letters)
    return len(letters) >= 200 and 50 * others <= len(letters)


def _one(header: bytes, letters: bytes, nucleotides: bool, known: bytes) -> Said | None:
    if nucleotides:
        letters, legal = letters.replace(b"U", b"T"), BASES + IUPAC
    else:
        letters, legal = letters[:-1] if letters.endswith(b"*") else letters, LETTERS
        letters = bytes(ord("X") if byte in b"J*" else byte for byte in letters)
    if b"\0" in header or b"\r" in header:
        return None
    if not set(letters) <= set(legal):
        letters = b""
    if not nucleotides:
        letters = bytes(byte if byte in known else ord("X") for byte in letters)
    id_, description = header, b""
    for place, byte in enumerate(header.lstrip(WHITE)):
        if byte in WHITE:
            header = header.lstrip(WHITE)
            id_, description = header[:place], header[place:].strip(WHITE)
            break
    return Said(_decoded(id_.strip(WHITE)), _decoded(description), letters)


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def decompressed(stored: bytes) -> bytes | None:
    """Return the text of a plain, gzip, or zstd file, or None if damaged; calls other functions than the package."""
    try:
        if stored.startswith(b"\x1f\x8b"):
            return gzip.decompress(stored)
        if stored.startswith((b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18")):
            return _zstd(stored)
    except (EOFError, OSError, zlib.error, zstandard.ZstdError):
        return None
    return stored


def _zstd(stored: bytes) -> bytes | None:
    reader = zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(
        io.BytesIO(stored), read_across_frames=True
    )
    return reader.read()  # a truncated last frame raises no error here: the text is then a prefix
