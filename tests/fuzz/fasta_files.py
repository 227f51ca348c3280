"""Hypothesis strategies for valid, odd, and damaged FASTA files, plain and compressed."""

import gzip
import zlib

import zstandard
from hypothesis import strategies as st

# Control characters, quotes, a byte order mark, line separators that do not end a FASTA line, ...
ODD = [">", "\t", "\x01", "\x1b", "\x1c", "\x7f", "\x85", "\u2028", "\ufeff", '"', "'", "é", "𝛼", "=", ";", "|"]  # noqa: RUF001
HEADERS = (
    st.lists(st.sampled_from(["a", "b", "sp|P1|X", " ", *ODD]), max_size=6).map(lambda parts: "".join(parts).encode())
    | st.sampled_from([b"", b"a", b"same", b"same", b" a", b"\ta\t b ", b"\xff\xfe", b"x" * 5000, b"a\0b", b"a\rb"])
    | st.binary(max_size=8).map(lambda data: data.replace(b"\n", b""))
)
LEGAL = "LAGVSERTIDPKQNFYMHWCXBUZOJlagvsertidpkqnfymhwcxbuzoj"
SEQUENCES = (
    st.text(LEGAL, min_size=1, max_size=40)
    | st.sampled_from(["MKV", "mkv", "MKV*", "MJV", "MXV", "M*V", "**", "M KV", "A" * 300])
    | st.text(LEGAL, min_size=1, max_size=6).map(lambda text: text * 30)
)
BAD_SEQUENCES = st.sampled_from(["", "*", "-", "M-V", "M.V", "MK1", "MK\u00e9", "M>V", "\0", "M\x7fV", "10 MKV"])
NEWLINES = st.sampled_from([b"\n", b"\n", b"\n", b"\r\n", b"\r\n", b"\n\n", b"\n \t\n"])
BEFORE = st.sampled_from(
    [b"", b"", b"", b"", b"\n", b" \r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n", b";note\n", b"MKV\n"]
)


@st.composite
def records(draw: st.DrawFn, sequences: st.SearchStrategy[str] = SEQUENCES) -> bytes:
    newline = draw(NEWLINES)
    sequence = draw(sequences).encode()
    width = draw(st.sampled_from([1, 5, 60, 1000]))
    lines = [sequence[start : start + width] for start in range(0, len(sequence), width)]
    return b">" + draw(HEADERS) + newline[-2:].lstrip(b" \t") + newline.join([*lines, b""])


GOOD_FILES = st.lists(records(), min_size=1, max_size=8).map(b"".join)
FILES = st.builds(
    lambda before, parts, end, cut: (before + b"".join(parts)).removesuffix(b"\n" if cut else b"") + end,
    BEFORE,
    st.lists(records() | records() | records() | records(BAD_SEQUENCES), max_size=6),
    st.sampled_from([b"", b"", b"\n\n", b"\r", b">", b">end", b"\x1a", b"\0", b" "]),
    st.booleans(),
)

PIECES = st.sampled_from(
    [b">", b"\n>", b"\r", b"\n", b"\0", b"*", b"-", b"\xef\xbb\xbf", b"\xff", b" ", b"J", b"@", b";"]
)


def _change(data: bytes, kind: str, place: float, other: float, piece: bytes) -> bytes:
    at, to = sorted((int(place * (len(data) + 1)), int(other * (len(data) + 1))))
    match kind:
        case "flip":
            return data[:at] + bytes(byte ^ 1 << to % 8 for byte in data[at : at + 1]) + data[at + 1 :]
        case "insert":
            return data[:at] + piece + data[at:]
        case "truncate":
            return data[:at]
        case "behead":
            return data[at:]
        case "remove":
            return data[:at] + data[to:]
        case "zero":
            return data[:at] + bytes(min(to - at, 64)) + data[at + min(to - at, 64) :]
        case "repeat":
            return data[:at] + data[at:to] + data[at:to] + data[to:]
    return data + piece


CHANGES = st.tuples(
    st.sampled_from(["flip", "flip", "insert", "insert", "truncate", "behead", "remove", "zero", "repeat", "append"]),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
    PIECES | st.binary(max_size=6),
)


def changed(data: bytes, changes: list[tuple[str, float, float, bytes]]) -> bytes:
    for change in changes:
        data = _change(data, *change)
    return data


# --- containers -------------------------------------------------------------------------------------------------


def bgzip_member(data: bytes) -> bytes:
    """Return a block of a bgzip file (SAM specification 4.1): gzip with its size in an extra field."""
    compressor = zlib.compressobj(6, zlib.DEFLATED, -15)
    body = compressor.compress(data) + compressor.flush()
    size = len(body) + 25
    header = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x06\0BC\x02\0" + size.to_bytes(2, "little")
    return header + body + zlib.crc32(data).to_bytes(4, "little") + len(data).to_bytes(4, "little")


def parts_of(data: bytes) -> list[bytes]:
    return [data[: len(data) // 3], data[len(data) // 3 : len(data) // 2], data[len(data) // 2 :]]


def bgzip(data: bytes) -> bytes:
    return b"".join(map(bgzip_member, [*parts_of(data), b""]))


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


CONTAINERS = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "members": lambda data: b"".join(gzip.compress(part, mtime=0) for part in parts_of(data)),
    "bgzip": bgzip,
    "zstd": zstd,
    "frames": lambda data: b"".join(map(zstd, parts_of(data))),
    "pzstd": lambda data: b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstd(data),
}
