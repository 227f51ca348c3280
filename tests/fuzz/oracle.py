"""What a FASTA file says, read line by line as naively as can be: the fuzz tests' second opinion."""

from __future__ import annotations

import gzip
import io
import zlib
from dataclasses import dataclass

import zstandard

WHITE = b" \t\r\n\v\f"
LETTERS = b"LAGVSERTIDPKQNFYMHWCXBUZO"  # fair-esm's order; the first has token 4


@dataclass
class Said:
    id: str
    description: str
    letters: bytes  # cleaned


def read(text: bytes) -> list[Said] | None:
    """Return the records, or None if the text is to be refused."""
    text = text.removeprefix(b"\xef\xbb\xbf").lstrip(WHITE)
    records: list[tuple[bytes, list[bytes]]] = []
    for line in text.split(b"\n"):
        if line.startswith(b">"):
            records.append((line[1:].rstrip(b"\r"), []))
        elif not records:
            return None
        else:
            records[-1][1].append(line)
    said = [_one(header, b"".join(lines)) for header, lines in records]
    return None if None in said else said  # type: ignore[return-value]


def _one(header: bytes, body: bytes) -> Said | None:
    letters = bytes(byte for byte in body if byte not in WHITE).upper()
    letters = letters[:-1] if letters.endswith(b"*") else letters
    letters = bytes(ord("X") if byte in b"J*" else byte for byte in letters)
    if not letters or not set(letters) <= set(LETTERS) or b"\0" in header or b"\r" in header:
        return None
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
    """Return the text of a plain, gzip or zstd file, by other calls than the package's; None if damaged."""
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
    return reader.read()  # a truncated last frame ends without an error here: the text is then a prefix
