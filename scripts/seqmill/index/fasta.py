"""Reading FASTA: plain, gzip, bgzip or zstd, in blocks of whole records."""

import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from seqmill.base.files import refuse_special
from seqmill.base.input_files import require_unchanged, stamp_of
from seqmill.errors import SeqmillError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK_BYTES = 2 << 20
READ_BYTES = 1 << 20
# With header and line ends. Letters, and the two tokens that frame them, are counted in 32 bits.
MAX_RECORD_BYTES = (1 << 31) - 4
SHOWN_ID = 100  # characters of an id in a message

GZIP_MAGIC = b"\x1f\x8b"
GZIP_EXTRA = 4  # flag of a member with an extra field, which in bgzip files is named BC
# bgzip ends with an empty block (SAM specification 4.1.2), so a file truncated between blocks is detected.
BGZIP_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
ZSTD_MAGICS = (b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18")  # a frame; the skippable frame that pzstd puts first
OTHER_MAGICS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip", b"\x89HDF": "HDF5"}
ZSTD_READ_BYTES = 4096  # at zstd's highest ratio, 128 kB from 4 bytes, these become 128 MB
ZSTD_MAX_WINDOW = 1 << 31  # as zstd --long=31 writes
UTF8_BOM = b"\xef\xbb\xbf"


class FastaRecord(NamedTuple):
    """One record of the file; `id` ends at the first white space of the header."""

    number: int  # 1 for the first record of the file
    id: str
    description: str
    body: bytes  # the lines below the header, line ends included


class FastaFile:
    """A FASTA file that is read once.

    Attributes, set after the last block: `size` in bytes as stored (compressed), `sha256` of those bytes, `stamp` of
    the file (`seqmill.base.input_files.stamp_of`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.sha256 = ""
        self.stamp = ""

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[list[FastaRecord]]:
        """Yield lists of consecutive records, about `block_bytes` of text each.

        Memory is bounded by the block and the longest record.

        Raises:
            SeqmillError: the file is unreadable, empty, truncated, compressed by an unknown program, or not FASTA; it
                changes while it is read; a record has more than MAX_RECORD_BYTES.
        """
        pending = bytearray()
        next_number = 1
        looked_to = 0  # search a long record once, not again for every chunk
        for chunk in self._text(min(READ_BYTES, block_bytes)):
            pending += chunk
            if next_number == 1:
                _drop_before_first_record(self.path, pending)
            if len(pending) < block_bytes:
                continue
            cut = pending.rfind(b"\n>", looked_to)
            if cut < 0:
                looked_to = len(pending) - 1
                self._require_short(pending, next_number)
                continue
            records = self._split(bytes(pending[:cut]), next_number)
            del pending[: cut + 1]
            next_number += len(records)
            looked_to = 0
            yield records
        if not pending.startswith(b">"):
            raise SeqmillError(f"{self.path}: the file is empty; expected FASTA records")
        yield self._split(bytes(pending), next_number)

    def _split(self, text: bytes, first_number: int) -> list[FastaRecord]:
        records = []
        is_long = len(text) > MAX_RECORD_BYTES  # else none of its records is
        for number, part in enumerate(text[1:].split(b"\n>"), start=first_number):
            if is_long:
                self._require_short(part, number)
            header, _, body = part.partition(b"\n")
            id_, description = self._split_header(header, number)
            records.append(FastaRecord(number, id_, description, body))
        return records

    def _require_short(self, text: bytes | bytearray, number: int) -> None:
        """Raise a SeqmillError if a record, which may be incomplete, is too long."""
        if len(text) > MAX_RECORD_BYTES:
            header, *_ = bytes(text[:READ_BYTES]).removeprefix(b">").split(b"\n", 1)
            id_, _ = self._split_header(header, number)
            raise SeqmillError(
                f"{self.path}: record {number} ({id_[:SHOWN_ID]!r}) has more than {MAX_RECORD_BYTES:,} bytes, the "
                "maximum; split it into several records"
            )

    def _split_header(self, header: bytes, number: int) -> tuple[str, str]:
        header = header.rstrip(b"\r")
        if b"\0" in header:
            raise SeqmillError(
                f"{self.path}: record {number}: the header holds a NUL byte; this is binary data, not FASTA"
            )
        if b"\r" in header:
            raise SeqmillError(
                f"{self.path}: record {number}: lines end in a lone carriage return (old Mac text); "
                "convert the file, e.g. tr '\\r' '\\n' < old.fasta > new.fasta"
            )
        # bytes.split splits only at ASCII white space, so an id may have any other character.
        words = header.split(None, 1)
        id_ = _decode(words[0]) if words else ""
        description = _decode(words[1].rstrip()) if len(words) > 1 else ""
        return id_, description

    def _text(self, read_bytes: int) -> Iterator[bytes]:
        """Yield the decompressed bytes, and hash the stored ones."""
        refuse_special(self.path)
        try:
            with self.path.open("rb") as raw:
                self.stamp = stamp_of(os.fstat(raw.fileno()))
                source = _HashingReader(raw)
                file = io.BufferedReader(source, READ_BYTES)
                magic = file.peek(16)[:16]
                if magic.startswith(GZIP_MAGIC):
                    yield from _read_gzip(file, read_bytes)
                    if magic[3] & GZIP_EXTRA and magic[12:14] == b"BC" and source.tail != BGZIP_END:
                        raise EOFError("the end mark of a bgzip file is missing")
                elif magic.startswith(ZSTD_MAGICS):
                    yield from _read_zstd(file)
                else:
                    for other, name in OTHER_MAGICS.items():
                        if magic.startswith(other):
                            raise SeqmillError(
                                f"{self.path}: this is {name} data; give plain, gzip, bgzip or zstd FASTA"
                            )
                    while chunk := file.read(read_bytes):
                        yield chunk
                self.size, self.sha256 = source.size, source.digest.hexdigest()
            require_unchanged(self.path, self.stamp)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise SeqmillError(
                f"{self.path}: the compressed data are truncated or damaged ({error}); copy or download the file again"
            ) from error
        except OSError as error:
            raise SeqmillError(f"{self.path}: cannot be read: {error.strerror or error}") from error


class _HashingReader(io.RawIOBase):
    """Passes bytes through and keeps their number, SHA-256 and the last few."""

    def __init__(self, raw: io.BufferedReader) -> None:
        self.raw = raw
        self.size = 0
        self.digest = hashlib.sha256()
        self.tail = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        count = self.raw.readinto(buffer)
        self.size += count
        data = memoryview(buffer)[:count]
        self.digest.update(data)
        self.tail = (self.tail + bytes(data[-len(BGZIP_END) :]))[-len(BGZIP_END) :]
        return count


def _read_gzip(file: BinaryIO, read_bytes: int) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as stream:  # bgzip has many gzip members, which GzipFile joins
        while chunk := stream.read(read_bytes):
            yield chunk


def _read_zstd(file: BinaryIO) -> Iterator[bytes]:
    import zstandard  # here, because a workflow reads FASTA files without the worker's packages

    # zstandard's stream_reader silently ends at a truncated frame; a decompression object reports it.
    frame = None
    while data := file.read(ZSTD_READ_BYTES):
        while data:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW).decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            data = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("the last zstd frame has no end")


def _decode(header: bytes) -> str:
    try:
        return header.decode("utf-8")
    except UnicodeDecodeError:
        return header.decode("latin-1")  # accepts every byte, so no header is refused


def _drop_before_first_record(path: Path, pending: bytearray) -> None:
    """Drop a byte order mark and blank lines, so that `pending` begins with '>' as soon as it has text."""
    if pending.startswith(b">"):
        return
    text = bytes(pending)
    if UTF8_BOM.startswith(text):
        return  # the rest of the mark may be in the next chunk
    text = text.removeprefix(UTF8_BOM).lstrip()
    if not text or text.startswith(b">"):
        pending[:] = text
        return
    first_line = text[:20].split(b"\n")[0].rstrip()
    if not first_line.isascii() or not first_line.decode("ascii").isprintable():
        reason = "this is binary data"
    elif first_line.startswith(b"@"):
        reason = "it begins with '@', as FASTQ does; convert it to FASTA"
    else:
        reason = f"the first line begins with {first_line.decode('ascii')!r}, not with '>'"
    raise SeqmillError(f"{path}: not a FASTA file: {reason}")
