"""Reading FASTA: every container, block size and unusual layout gives the same records."""

import gzip
import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from Bio import bgzf
from Bio.SeqIO.FastaIO import SimpleFastaParser
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmill.errors import SeqmillError
from seqmill.index import fasta
from seqmill.index.fasta import FastaFile

PROTEINS = Path(__file__).parents[2] / "data" / "NC_000932.faa"

BOM = b"\xef\xbb\xbf"

# Everything at once: byte order mark, blank lines, CRLF, '>' in a header, an empty id, no final newline.
ODD = (
    BOM + b"\r\n \n>one first > record\r\nMKV\r\nLA\r\n\r\n"
    b"> two\tb  c \nMK>V\n\n>three\n>\nACD\n>fi|ve/\"5'\nM\n\n\nK V*\n>six \xc3\xa9\nWW"
)
ODD_RECORDS = [
    (1, "one", "first > record", b"MKV\r\nLA\r\n\r"),
    (2, "two", "b  c", b"MK>V\n"),
    (3, "three", "", b""),
    (4, "", "", b"ACD"),
    (5, "fi|ve/\"5'", "", b"M\n\n\nK V*"),
    (6, "six", "\u00e9", b"WW"),
]


def gzip_members(text: bytes, size: int) -> bytes:
    return b"".join(gzip.compress(text[start : start + size]) for start in range(0, len(text), size))


def bgzip(text: bytes, size: int) -> bytes:
    stored = io.BytesIO()
    writer = bgzf.BgzfWriter(fileobj=stored)
    for start in range(0, len(text), size):
        writer.write(text[start : start + size])
        writer.flush()  # ends the bgzip block
    stored.write(bgzf._bgzf_eof)
    return stored.getvalue()


def zstd_frames(text: bytes, size: int) -> bytes:
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    return b"".join(compressor.compress(text[start : start + size]) for start in range(0, len(text), size))


def zstd_stream(text: bytes) -> bytes:
    """One frame without its size, as `zstd` writes from a pipe."""
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return stream.compress(text) + stream.flush()


def pzstd(text: bytes, size: int) -> bytes:
    """Like pzstd: a skippable frame with the size precedes each frame."""
    stored = b""
    for start in range(0, len(text), size):
        frame = zstandard.ZstdCompressor().compress(text[start : start + size])
        stored += b"\x50\x2a\x4d\x18\x04\x00\x00\x00" + len(frame).to_bytes(4, "little") + frame
    return stored


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "gzip in members": lambda text: gzip_members(text, max(len(text) // 7, 1)),
    "gzip in members of 1 byte": lambda text: gzip_members(text[:300], 1) + gzip.compress(text[300:]),
    "gzip with an empty member and zero padding": lambda text: gzip.compress(b"") + gzip.compress(text) + bytes(512),
    "bgzip": lambda text: bgzip(text, max(len(text), 1)),
    "bgzip in blocks": lambda text: bgzip(text, max(len(text) // 7, 1)),
    "zstd": lambda text: zstd_frames(text, max(len(text), 1)),
    "zstd of unknown size": zstd_stream,
    "zstd in frames": lambda text: zstd_frames(text, max(len(text) // 7, 1)),
    "zstd in frames of 1 byte": lambda text: zstd_frames(text[:300], 1) + zstd_frames(text[300:], 1 << 20),
    "zstd with an empty frame": lambda text: zstd_frames(text, 40) + zstandard.ZstdCompressor().compress(b""),
    "pzstd": lambda text: pzstd(text, max(len(text) // 3, 1)),
}

Record = tuple[int, str, str, bytes]


def read(path: Path, **options: int) -> list[Record]:
    blocks = FastaFile(path).blocks(**options)
    return [(record.number, record.id, record.description, record.body) for block in blocks for record in block]


def read_bytes(folder: Path, stored: bytes, **options: int) -> list[Record]:
    path = folder / "input.fasta"
    path.write_bytes(stored)
    return read(path, **options)


def read_or_refuse(folder: Path, stored: bytes) -> list[Record] | str:
    try:
        return read_bytes(folder, stored)
    except SeqmillError as error:
        return str(error)


def letters(body: bytes) -> str:
    return b"".join(body.split()).decode("ascii")


def long_sequence(number: int) -> bytes:
    """Return 0 to 900 letters that hardly compress."""
    length = number * 379 % 901
    return hashlib.shake_256(b"%d" % number).digest(length).translate(bytes(65 + byte % 26 for byte in range(256)))


@pytest.fixture(scope="module")
def long_text() -> bytes:
    """700 records, about 300 kB: several bgzip blocks and zstd blocks."""
    lines = []
    for number in range(1, 701):
        sequence = long_sequence(number)
        lines.append(b">record%d of many\n" % number)
        lines.extend(sequence[start : start + 60] + b"\n" for start in range(0, len(sequence), 60))
    return b"".join(lines)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1 << 20])
def test_containers_give_the_same_records(container: str, block_bytes: int, tmp_path: Path):
    assert read_bytes(tmp_path, CONTAINERS[container](ODD), block_bytes=block_bytes) == ODD_RECORDS


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_of_a_longer_file(container: str, long_text: bytes, tmp_path: Path):
    found = read_bytes(tmp_path, CONTAINERS[container](long_text), block_bytes=5000)
    assert [record[:3] for record in found] == [(number, f"record{number}", "of many") for number in range(1, 701)]
    for number, _, _, body in found:
        assert letters(body).encode() == long_sequence(number), number


def test_every_block_size_gives_the_same_records(tmp_path: Path):
    path = tmp_path / "odd.fasta"
    path.write_bytes(ODD)
    for block_bytes in range(1, len(ODD) + 3):
        assert read(path, block_bytes=block_bytes) == ODD_RECORDS, block_bytes
    assert [len(block) for block in FastaFile(path).blocks(block_bytes=1)] == [1] * 6


def test_blocks_are_consecutive_and_about_as_long_as_requested(long_text: bytes, tmp_path: Path):
    path = tmp_path / "long.fasta"
    path.write_bytes(long_text)
    blocks = list(FastaFile(path).blocks(block_bytes=4096))
    assert [record.number for block in blocks for record in block] == list(range(1, 701))
    assert len(blocks) > 20
    for block in blocks:
        assert sum(len(record.body) for record in block) <= 2 * 4096
    assert len(list(FastaFile(path).blocks())) == 1


@pytest.mark.parametrize("container", ["plain", "gzip", "zstd"])
def test_a_record_much_longer_than_a_block(container: str, tmp_path: Path):
    giant = b"MKVLA" * 40_000
    text = b">a\nMK\n>giant x\n" + b"\n".join(giant[at : at + 61] for at in range(0, len(giant), 61))
    text += b"".join(b"\n>after%d\nW" % number for number in range(1000))
    found = read_bytes(tmp_path, CONTAINERS[container](text), block_bytes=100)
    assert [record[:3] for record in found[:3]] == [(1, "a", ""), (2, "giant", "x"), (3, "after0", "")]
    assert letters(found[1][3]).encode() == giant
    assert {letters(record[3]) for record in found[2:]} == {"W"}
    assert [record[0] for record in found] == list(range(1, 1003))


def test_blocks_are_short_again_after_a_long_record(tmp_path: Path):
    path = tmp_path / "giant.fasta"
    path.write_bytes(b">giant\n" + b"MKVLA" * 40_000 + b"\n>after\nW" * 1000)
    first, *others = FastaFile(path).blocks(block_bytes=100)
    assert first[0].id == "giant"
    assert sum(map(len, others)) > 900
    assert max(map(len, others)) <= 200 // len(">after\nW\n")


LAYOUTS = {
    "CRLF": (b">a b\r\nMK\r\nV\r\n>c\r\nW\r\n", [("a", "b", "MKV"), ("c", "", "W")]),
    "CRLF and LF mixed": (b">a b\r\nMK\nV\r\n>c\nW\r\n", [("a", "b", "MKV"), ("c", "", "W")]),
    "no final newline": (b">a\nMK\n>c\nW", [("a", "", "MK"), ("c", "", "W")]),
    "header alone at the end": (b">a\nMK\n>c", [("a", "", "MK"), ("c", "", "")]),
    "blank lines": (b">a\n\n\nMK\n \t\n\nV\n\n\n>c\n\nW\n\n\n", [("a", "", "MKV"), ("c", "", "W")]),
    "byte order mark": (BOM + b">a\nMK\n", [("a", "", "MK")]),
    "leading blank lines": (b"\n\r\n  \n\t\n>a\nMK\n", [("a", "", "MK")]),
    "byte order mark and blank lines": (BOM + b"\r\n\n>a\nMK\n", [("a", "", "MK")]),
    "> in headers": (b">a>b c>d >e\nMK\n>>c\nW\n", [("a>b", "c>d >e", "MK"), (">c", "", "W")]),
    "space after >": (b">  a  b\nMK\n", [("a", "b", "MK")]),
    "tabs in headers": (b">a\tb\tc\nMK\n>\td e\nW\n", [("a", "b\tc", "MK"), ("d", "e", "W")]),
    "trailing spaces in headers": (b">a \nMK\n>c  d e \t\nW\n", [("a", "", "MK"), ("c", "d e", "W")]),
    "UTF-8 headers": (
        ">\u86cb\u767d\u8d28 na\u00efve \u03b1\u00a0\u03b2\nMK\n".encode(),
        [("\u86cb\u767d\u8d28", "na\u00efve \u03b1\u00a0\u03b2", "MK")],
    ),
    "latin-1 headers": (b">prot\xe9ine \xb5\xa0m\nMK\n", [("prot\u00e9ine", "\u00b5\u00a0m", "MK")]),
    "long ids": (b">" + b"i" * 300 + b" d\nMK\n", [("i" * 300, "d", "MK")]),
    "empty ids": (b">\nMK\n>  \nW\n>\r\nC\n", [("", "", "MK"), ("", "", "W"), ("", "", "C")]),
    "repeated ids": (b">a\nMK\n>a\nMK\n", [("a", "", "MK"), ("a", "", "MK")]),
    "control characters in ids": (b">a\x1cb\x7f c\x01\nMK\n", [("a\x1cb\x7f", "c\x01", "MK")]),
    "no sequences": (b">a\n>b\n\n>c\n", [("a", "", ""), ("b", "", ""), ("c", "", "")]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, tmp_path: Path):
    text, expected = LAYOUTS[layout]
    for block_bytes in (1, 2, 3, 5, 1 << 20):
        found = read_bytes(tmp_path, text, block_bytes=block_bytes)
        assert [(id_, description, letters(body)) for _, id_, description, body in found] == expected
        assert [record[0] for record in found] == list(range(1, len(expected) + 1))


@pytest.mark.parametrize("container", CONTAINERS)
def test_size_and_digest_are_those_of_the_stored_file(container: str, long_text: bytes, tmp_path: Path):
    for text in (ODD, long_text):
        stored = CONTAINERS[container](text)
        path = tmp_path / "input"
        path.write_bytes(stored)
        source = FastaFile(path)
        assert sum(len(block) for block in source.blocks(block_bytes=1000)) > 0
        assert source.size == len(stored)
        assert source.sha256 == hashlib.sha256(stored).hexdigest()


# No time stamp: these bytes are part of the tests' names, which must be equal in all pytest-xdist processes.
GZIP_OF_NOTHING, GZIP_OF_LINES = gzip.compress(b"", mtime=0), gzip.compress(b"\n" * 3000, mtime=0)


@pytest.mark.parametrize(
    "stored",
    [b"", b"\n", b" \r\n\t\n", BOM, BOM + b"\n\n", GZIP_OF_NOTHING, zstd_stream(b""), GZIP_OF_LINES],
)
@pytest.mark.parametrize("block_bytes", [1, 2, 1 << 20])
def test_a_file_without_text_is_empty(stored: bytes, block_bytes: int, tmp_path: Path):
    with pytest.raises(SeqmillError, match=r"input\.fasta: the file is empty"):
        read_bytes(tmp_path, stored, block_bytes=block_bytes)


@pytest.mark.parametrize("container", ["gzip", "gzip in members", "bgzip", "zstd", "zstd of unknown size", "pzstd"])
def test_a_cut_anywhere_is_an_error_or_ends_at_a_member(container: str, tmp_path: Path):
    """A cut between two members leaves a legal, shorter file; any other cut must be noticed."""
    stored = CONTAINERS[container](ODD)
    if container in ("gzip", "bgzip", "zstd", "zstd of unknown size"):  # bgzip has an end mark
        legal = set()
    elif container == "pzstd":
        third = len(ODD) // 3
        ends = [len(pzstd(ODD[: count * third], third)) for count in (1, 2, 3)]
        legal = {end + skipped for end in ends for skipped in (0, 12)}
    else:
        seventh = len(ODD) // 7
        legal = {len(gzip_members(ODD[: count * seventh], seventh)) for count in range(1, 8)}
    for end in range(len(stored)):
        found = read_or_refuse(tmp_path, stored[:end])
        assert isinstance(found, list) == (end in legal), (end, found)
        if isinstance(found, list):
            assert found[:-1] == ODD_RECORDS[: len(found) - 1], end
        else:
            assert "input.fasta" in found


@pytest.mark.parametrize("container", ["gzip", "bgzip", "zstd"])
def test_a_flipped_bit_is_an_error_or_harmless(container: str, tmp_path: Path):
    stored = bytearray(CONTAINERS[container](ODD))
    noticed = 0
    for position in range(len(stored)):
        for bit in (0, 3, 7):
            stored[position] ^= 1 << bit
            found = read_or_refuse(tmp_path, bytes(stored))
            assert found == ODD_RECORDS or "input.fasta" in found, (position, bit)  # harmless: gzip's time stamp
            noticed += isinstance(found, str)
            stored[position] ^= 1 << bit
    assert noticed > 2 * len(stored)


def test_garbage_after_the_compressed_data_is_an_error(tmp_path: Path):
    for container in ("gzip", "zstd"):
        with pytest.raises(SeqmillError, match="truncated or damaged"):
            read_bytes(tmp_path, CONTAINERS[container](ODD) + b"garbage")


def biopython(text: str) -> list[tuple[str, str]]:
    return list(SimpleFastaParser(io.StringIO(text, newline=None)))


def test_agrees_with_biopython_on_real_proteins():
    expected = biopython(PROTEINS.read_text(encoding="utf-8"))
    assert len(expected) > 50
    for block_bytes in (100, 1 << 20):
        found = read(PROTEINS, block_bytes=block_bytes)
        assert [(f"{id_} {description}".rstrip(), letters(body)) for _, id_, description, body in found] == expected


# Biopython trims other white space than we do, so these headers have no control characters or exotic spaces.
HEADERS = st.text(st.characters(categories=["L", "N", "P", "S"]) | st.just(" "), max_size=30).map(str.strip)
LINES = st.lists(st.text("ACDEFGHIKLMNPQRSTVWYX*acdj-", max_size=12), max_size=5)


@given(
    records=st.lists(st.tuples(HEADERS, LINES), min_size=1, max_size=12),
    newline=st.sampled_from(["\n", "\r\n"]),
    final_newline=st.booleans(),
    leading_blanks=st.integers(0, 2),
    container=st.sampled_from(sorted(CONTAINERS)),
    block_bytes=st.integers(1, 80),
)
@settings(max_examples=150, deadline=None)
def test_agrees_with_biopython_on_generated_files(
    records: list[tuple[str, list[str]]],
    newline: str,
    final_newline: bool,
    leading_blanks: int,
    container: str,
    block_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
):
    lines = [line for header, sequence in records for line in (f">{header}", *sequence)]
    text = newline * leading_blanks + newline.join(lines) + newline * final_newline
    expected = biopython(text)
    assert len(expected) == len(records)
    folder = tmp_path_factory.getbasetemp()
    found = read_bytes(folder, CONTAINERS[container](text.encode()), block_bytes=block_bytes)
    assert [(id_, letters(body)) for _, id_, _, body in found] == [
        (title.split(" ")[0] if title else "", sequence) for title, sequence in expected
    ]
    assert [description for _, _, description, _ in found] == [title.partition(" ")[2].strip() for title, _ in expected]


@pytest.mark.parametrize("block_bytes", [1, 50, 10_000])
def test_a_record_that_is_too_long(block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "long.fa"
    header, line = b">chr1 of a lungfish\n", b"ACGTACGTA\n"
    path.write_bytes(b">first\nACGT\n" + header + 98 * line + b">last\nACGT\n")
    monkeypatch.setattr(fasta, "MAX_RECORD_BYTES", len(header + 98 * line))
    assert [len(r.body) for block in FastaFile(path).blocks(block_bytes) for r in block] == [4, 979, 5]
    for end in (b"", b">last\nACGT\n"):
        path.write_bytes(b">first\nACGT\n" + header + 100 * line + end)
        with pytest.raises(SeqmillError, match=r"record 2 \('chr1'\) has more than 1,000 bytes.*; split it"):
            list(FastaFile(path).blocks(block_bytes))


def test_a_record_that_is_too_long_is_refused_before_all_of_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "long.fa"
    path.write_bytes(b">first\nACGT\n>chr1\n" + 10_000 * b"ACGTACGTA\n")
    monkeypatch.setattr(fasta, "MAX_RECORD_BYTES", 1000)
    read = []

    class Counted(FastaFile):
        def _text(self, read_bytes: int):
            for chunk in super()._text(read_bytes):
                read.append(len(chunk))
                yield chunk

    with pytest.raises(SeqmillError, match=r"record 2 \('chr1'\) has more than 1,000 bytes"):
        list(Counted(path).blocks(100))
    assert sum(read) <= 1200
