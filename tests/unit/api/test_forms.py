"""The forms in which sequences may be given."""

import gzip
import io
from pathlib import Path

import numpy as np
import pandas
import pytest
from Bio.Seq import Seq
from Bio.SeqRecord import SeqRecord

from seqmill import SeqmillError
from seqmill.api.records import read_blocks


def read(sequences: object, block_bytes: int = 1 << 20) -> list[tuple[str, str]]:
    """Return ids and sequences."""
    _, blocks = read_blocks(sequences, block_bytes)
    return [(record.id, record.body.decode()) for block in blocks for record in block]


@pytest.mark.parametrize(
    "given",
    [
        ["MKT", "MAV"],
        ("MKT", "MAV"),
        iter(["MKT", "MAV"]),
        [b"MKT", b"MAV"],
        np.array(["MKT", "MAV"]),
        pandas.Series(["MKT", "MAV"], index=[7, 9]),
        np.array(["MKT", "MAV"]).astype(object),
        [Seq("MKT"), "MAV"],
    ],
)
def test_sequences_without_ids_get_their_numbers(given: object) -> None:
    assert read(given) == [("1", "MKT"), ("2", "MAV")]


@pytest.mark.parametrize(
    "given",
    [
        {"a": "MKT", "b/c": Seq("MAV")},
        [("a", "MKT"), ("b/c", "MAV")],
        zip(["a", "b/c"], ["MKT", "MAV"], strict=True),
        [SeqRecord(Seq("MKT"), id="a"), SeqRecord(Seq("MAV"), id="b/c")],
        [("a", SeqRecord(Seq("MKT"), id="other")), ("b/c", Seq("MAV"))],
        {"a": "MKT", "b/c": "MAV"}.items(),
        pandas.Series(["MKT", "MAV"], index=["a", "b/c"]),
    ],
)
def test_ids_come_from_dicts_pairs_and_records(given: object) -> None:
    assert read(given) == [("a", "MKT"), ("b/c", "MAV")]


@pytest.mark.parametrize("given", ["MKT", b"MKT", Seq("MKT"), SeqRecord(Seq("MKT"), id="1")])
def test_one_sequence(given: object) -> None:
    assert read(given) == [("1", "MKT")]


def test_a_fasta_file_by_path_or_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.faa.gz"
    path.write_bytes(gzip.compress(b">a x\nMKT\n>b\nMAV\n"))
    expected = [("a", "MKT"), ("b", "MAV\n")]
    assert read(path) == read(str(path)) == expected
    monkeypatch.chdir(tmp_path)
    assert read("some.faa.gz") == expected


def test_a_name_that_may_be_a_sequence_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "PRTEINS").write_text(">a\nMKT\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SeqmillError, match=r"^PRTEINS: a file has this name; give Path\('PRTEINS'\)"):
        read("PRTEINS")
    assert read(Path("PRTEINS")) == [("a", "MKT\n")]
    assert read(["PRTEINS"]) == [("1", "PRTEINS")]
    assert read("M" * 5000) == [("1", "M" * 5000)]  # too long for the name of a file


def test_blocks_are_read_as_they_are_needed() -> None:
    taken = []

    def sequences():
        for number in range(10):
            taken.append(number)
            yield "M" * 10

    _, blocks = read_blocks(sequences(), 25)
    assert [record.number for record in next(blocks)] == [1, 2, 3]
    assert taken == [0, 1, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "^sequences: int is not the type of a sequence, of a collection of sequences or of a path"),
        (None, "^sequences: NoneType is not"),
        (["MKT", 5.0], r"^sequences: record 2 \('2'\) is of type float; give text"),
        ([("a", "MKT"), ("b", None)], r"^sequences: record 2 \('b'\) is missing; leave it out"),
        (pandas.Series(["MKT", float("nan")]), r"^sequences: record 2 \('2'\) is missing"),
        (["MKT", pandas.NA], r"^sequences: record 2 \('2'\) is missing"),
        (np.array([["a", "MKT"]]), r"^sequences: record 1 \('1'\) is of type ndarray"),
        ([("a", "MKT", "x")], r"^sequences: record 1 \('1'\) is of type tuple"),
        ([["a", "MKT"]], r"^sequences: record 1 \('1'\) is of type list; .* or a tuple of an id and one of these"),
        (pandas.DataFrame({"id": ["a"], "seq": ["MKT"]}), "^sequences: a DataFrame has several columns; give one"),
        (io.StringIO(">a\nMKT\n"), "^sequences: a StringIO is an open file; give its Path"),
        (">sp|P1.2/x\nMKT\n", "^sequences: this text is FASTA; write it to a file"),
        ({"a\udc80": "MKT"}, r"^sequences: record 1 .*surrogates"),
        ([Seq(None, 5)], r"^sequences: record 1 \('1'\): "),
        (["MK\udc80"], r"^sequences: record 1 \('1'\): .*surrogates"),
        ("no.such.faa", "^no.such.faa: cannot be read: No such file"),
    ],
)
def test_what_is_no_sequence(given: object, message: str) -> None:
    with pytest.raises(SeqmillError, match=message):
        read(given)
