"""records.tsv.gz read back by pandas and by Python's csv: a row and a fate for every record."""

import csv
import gzip
import io
from pathlib import Path

import pandas as pd
import pytest

from pipeline import MODEL
from seqmill.index.build import build_index
from seqmill.merge.records import BLOCK, COLUMNS, write_records
from seqmill.spec.lengths import LengthPolicy
from seqmill.store.index import Index, open_index

LONG = "MKVLAGSTCY"  # longer than max_length=5

# Header, sequence, then the fate under "truncate" and under "reject".
RECORDS: list[tuple[str, str, str, str]] = [
    ("plain one", "MKV", "embedded", "embedded"),
    ('"quoted" with "quotes" in it', "MKVL", "embedded", "embedded"),
    ("half\"quoted 'single'", "MKV*", "duplicate", "duplicate"),
    ("sp|P12345|NAME_HUMAN Some protein OS=Homo sapiens", LONG, "truncated", "rejected"),
    ("path/to/id a\tb\tc", "mkvl", "duplicate", "duplicate"),
    ("NA NA", "A", "embedded", "embedded"),
    ("nan null", "C", "embedded", "embedded"),
    ("NULL", LONG.lower(), "duplicate", "rejected"),
    ("", "D", "embedded", "embedded"),
    ("007", "E", "embedded", "embedded"),
    ("1e5 -0.0", "A", "duplicate", "duplicate"),
    ("=1+1 #comment, with; separators \\ \\t", "F", "embedded", "embedded"),
    ("\u86cb\u767d\u8d28 na\u00efve \u03b1\u00a0\u03b2 \u2028 \x85 end", "G", "embedded", "embedded"),
    ("i" * 300 + " " + "d" * 3000, "H", "embedded", "embedded"),
    ("plain again", "I", "embedded", "embedded"),
    ("plain again", "I", "duplicate", "duplicate"),
    ("#first", LONG + "W", "truncated", "rejected"),
    ('"', "K", "embedded", "embedded"),
    ("\x1b[2J\x0bx y\x0cz", "L", "embedded", "embedded"),
]
SAME_AS = {3: 1, 5: 2, 8: 4, 11: 6, 16: 15}
IDS = [header.split(" ")[0].split("\t")[0].split("\x0b")[0] for header, *_ in RECORDS]
DESCRIPTIONS = [header[len(id_) + 1 :] for (header, *_), id_ in zip(RECORDS, IDS, strict=True)]


def test_invalid_records_have_a_reason(tmp_path: Path) -> None:
    fasta = tmp_path / "some.fasta"
    fasta.write_text(">a\nMKVLA\n>b\nM-K\n>c\nMK\n>d\n\n")
    build_index(fasta, tmp_path / "index.h5", MODEL, LengthPolicy("reject", 4), on_invalid="skip")
    write_records(tmp_path / "records.tsv.gz", open_index(tmp_path / "index.h5"))
    table = pd.read_csv(tmp_path / "records.tsv.gz", sep="\t", keep_default_na=False)
    assert table["fate"].tolist() == ["rejected", "rejected", "embedded", "rejected"]
    assert table["length"].tolist() == [5, 0, 2, 0]
    assert table["row"].tolist() == ["", "", "0", ""]
    invalid = "invalid: a letter that is not allowed, or no sequence"
    assert table["reason"].tolist() == ["longer than max_length=4", invalid, "", invalid]


def index_of(folder: Path, records: list[tuple[str, str]], policy: LengthPolicy, model: str = MODEL) -> Index:
    fasta = folder / "some.fasta"
    fasta.write_bytes(b"".join(f">{header}\n{sequence}\n".encode() for header, sequence in records))
    build_index(fasta, folder / "index.h5", model, policy)
    return open_index(folder / "index.h5")


@pytest.fixture(params=["truncate", "reject"])
def long_sequences(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def table(long_sequences: str, tmp_path: Path) -> Path:
    records = [(header, sequence) for header, sequence, *_ in RECORDS]
    path = tmp_path / "records.tsv.gz"
    write_records(path, index_of(tmp_path, records, LengthPolicy(long_sequences, 5)))
    return path


def by_pandas(path: Path) -> list[dict[str, str]]:
    frame = pd.read_csv(path, sep="\t", keep_default_na=False, dtype=str)
    assert tuple(frame.columns) == COLUMNS
    return frame.to_dict("records")


def by_csv(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize("read", [by_pandas, by_csv])
def test_every_record_has_its_row(read, long_sequences: str, table: Path):
    rows = read(table)
    assert len(rows) == len(RECORDS)
    assert [row["record"] for row in rows] == [str(number) for number in range(1, len(RECORDS) + 1)]
    assert [row["id"] for row in rows] == IDS
    assert [row["description"] for row in rows] == DESCRIPTIONS

    next_row = 0
    for number, (row, (_, sequence, truncated, rejected)) in enumerate(zip(rows, RECORDS, strict=True), start=1):
        fate = truncated if long_sequences == "truncate" else rejected
        length = len(sequence.rstrip("*"))
        assert row["fate"] == fate
        assert row["length"] == str(length)
        assert row["reason"] == ("longer than max_length=5" if length > 5 else "")
        assert row["same_as"] == (str(SAME_AS[number]) if fate == "duplicate" else "")
        if fate == "rejected":
            assert (row["row"], row["embedded_length"], row["windows"]) == ("", "0", "0")
        else:
            assert (row["row"], row["embedded_length"], row["windows"]) == (str(next_row), str(min(length, 5)), "1")
            next_row += 1
    assert next_row == (19 if long_sequences == "truncate" else 16)


@pytest.mark.parametrize("strand", ["forward", "both"])
def test_windows_are_counted_per_record(strand: str, tmp_path: Path):
    """One window up to max_length, else windows of 6 bases with stride 4; strands are not counted."""
    windows = {5: 1, 10: 1, 11: 3, 14: 3, 15: 4, 30: 7}
    lengths = [30, 5, 10, 11, 14, 15, 30]
    records = [(f"r{length}", ("ACGGT" * 6)[:length]) for length in lengths]
    policy = LengthPolicy("window", 10, 6, 4, strand)
    write_records(tmp_path / "records.tsv.gz", index_of(tmp_path, records, policy, "untrained:dnabert_s"))
    rows = by_csv(tmp_path / "records.tsv.gz")
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        assert (row["length"], row["embedded_length"]) == (str(length), str(length))
        assert (row["windows"], row["row"]) == (str(windows[length]), str(number))
        assert row["reason"] == ("longer than max_length=10" if length > 10 else "")
    fates = ["windowed", "embedded", "embedded", "windowed", "windowed", "windowed", "duplicate"]
    assert [row["fate"] for row in rows] == fates
    assert rows[-1]["same_as"] == "1"


def test_short_nucleotide_sequences_are_one_window_each(tmp_path: Path):
    records = [("a", "ACGT"), ("b", "acgu"), ("c", "TTT")]
    index = index_of(tmp_path, records, LengthPolicy("window", 10, 10, 10), "untrained:dnabert_s")
    write_records(tmp_path / "records.tsv.gz", index)
    rows = by_csv(tmp_path / "records.tsv.gz")
    assert [(row["windows"], row["fate"]) for row in rows] == [("1", "embedded"), ("1", "duplicate"), ("1", "embedded")]


@pytest.mark.parametrize("long_sequences", ["truncate"])
def test_lines_equal_those_of_csv(table: Path):
    """Fields are quoted where Python's own writer quotes them, and nowhere else."""
    with gzip.open(table, "rt", encoding="utf-8", newline="") as file:
        text = file.read()
    again = io.StringIO(newline="")
    csv.writer(again, delimiter="\t", lineterminator="\n").writerows(
        csv.reader(io.StringIO(text, newline=""), delimiter="\t")
    )
    assert text == again.getvalue()
    assert text.count('"') > 10


def test_two_writes_have_the_same_bytes(table: Path, tmp_path: Path):
    index = open_index(tmp_path / "index.h5")
    other = tmp_path / "another name.gz"
    write_records(other, index)
    assert other.read_bytes() == table.read_bytes()


def test_row_numbers_continue_from_block_to_block(tmp_path: Path):
    """More records than are written at once, every seventh is rejected, and most of the others are duplicates."""
    num_records = BLOCK + 1000
    records = [
        (f"r{number}", LONG if number % 7 == 0 else "ACDEF"[number % 5 :] + "GHIKL"[: number % 3])
        for number in range(num_records)
    ]
    index = index_of(tmp_path, records, LengthPolicy("reject", 9))
    write_records(tmp_path / "records.tsv.gz", index)
    rows = by_csv(tmp_path / "records.tsv.gz")
    assert [row["id"] for row in rows] == [header for header, _ in records]
    kept = [row for row in rows if row["fate"] != "rejected"]
    assert [row["row"] for row in kept] == [str(number) for number in range(len(kept))]
    assert [int(row["record"]) for row in kept] == [number + 1 for number in range(num_records) if number % 7]
    firsts: dict[str, str] = {}
    for row, (_, sequence) in zip(rows, records, strict=True):
        first = firsts.setdefault(sequence, row["record"])
        if row["fate"] != "rejected":
            assert row["same_as"] == ("" if first == row["record"] else first)


def test_the_compressed_table_has_no_time_and_no_name(table: Path):
    stored = table.read_bytes()
    assert stored[3] & 0b1000 == 0  # no file name
    assert stored[4:8] == bytes(4)  # no time
    text = gzip.decompress(stored)
    assert text.startswith("\t".join(COLUMNS).encode() + b"\n")
    assert text.endswith(b"\n")
    assert b"\r" not in text
