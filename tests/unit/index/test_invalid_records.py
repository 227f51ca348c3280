"""Invalid records: all of a file are named in one error, or left out with `on_invalid: skip`."""

import json
import logging
import tracemalloc
from pathlib import Path

import pytest

from seqmill.errors import SeqmillError
from seqmill.index.build import build_index
from seqmill.index.fasta import FastaRecord
from seqmill.index.invalid import InvalidRecords
from seqmill.spec.lengths import LengthPolicy
from seqmill.store.index import Index, open_index
from seqmill.store.index_format import Fate

MODEL, CONTIGS = "untrained:esm2_t6_8M_UR50D", "untrained:dnabert_s"
MIXED = b">a\nMKv*\n>b x\nmk-v*\n>c\n>d\nMKV\n>e\nM1\n>f\nAAAAAAA\n"
LINES = [
    "record 2 ('b'): '-' at residue 3 is not an amino-acid letter: this looks like an alignment; remove the gaps (e.g. "
    "with seqkit seq -g)",
    "record 3 ('c'): it has no sequence; remove it",
    "record 5 ('e'): '1' at residue 2 is not an amino-acid letter: remove numbers and positions from the sequence",
]
ADVICE = "set on_invalid: skip (--on-invalid skip) to leave out invalid records"


def write(tmp_path: Path, text: bytes) -> Path:
    path = tmp_path / "some.fasta"
    path.write_bytes(text)
    return path


def skipping(fasta: Path, model: str = MODEL, policy: LengthPolicy | None = None) -> Index:
    output = fasta.with_name("index.h5")
    build_index(fasta, output, model, policy or LengthPolicy(), on_invalid="skip")
    return open_index(output)


def refusal(fasta: Path, model: str = MODEL, on_invalid: str = "fail") -> str:
    output = fasta.with_name("index.h5")
    with pytest.raises(SeqmillError) as caught:
        build_index(fasta, output, model, LengthPolicy(), on_invalid=on_invalid)
    assert list(fasta.parent.iterdir()) == [fasta]
    return str(caught.value).removeprefix(f"{fasta}: ")


def test_one_error_names_all_invalid_records(tmp_path: Path) -> None:
    head, *lines = refusal(write(tmp_path, MIXED)).split("\n  ")
    assert head == f"3 records are invalid; mend them, or {ADVICE}:"
    assert lines == LINES


def test_a_single_invalid_record_is_one_line(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, b">a\nMKV\n>c\n")) == f"record 2 ('c'): it has no sequence; remove it; or {ADVICE}"


@pytest.mark.parametrize(("model", "good"), [(MODEL, b"MKV"), (CONTIGS, b"ACGT")])
def test_the_first_20_are_named_and_the_rest_counted(model: str, good: bytes, tmp_path: Path) -> None:
    """Also beyond the first block of the file, which has 2 MiB."""
    text = b"".join(b">r%d\n%s\n" % (number, b"!" if number % 2 else good) for number in range(300_000))
    head, *lines = refusal(write(tmp_path, text), model).split("\n  ")
    assert head.startswith("150,000 records are invalid; ")
    assert [line.partition(":")[0] for line in lines[:-1]] == [f"record {n} ('r{n - 1}')" for n in range(2, 42, 2)]
    assert lines[-1] == "and 149,980 more"


def test_memory_does_not_grow_with_the_invalid_records() -> None:
    invalid, reason = InvalidRecords(), SeqmillError("it has no sequence; remove it")
    invalid.add(FastaRecord(1, "x" * 10_000, "", b""), reason)
    tracemalloc.start()
    try:
        for number in range(2, 20_000):
            invalid.add(FastaRecord(number, "x" * 10_000, "", b""), reason)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert invalid.count == 19_999
    assert kept < 10_000


def test_skipped_records_are_rejected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fasta = write(tmp_path, MIXED)
    caplog.set_level(logging.WARNING)
    index = skipping(fasta)
    assert index.record_rows.tolist() == [1, -1, -1, 1, -1, 0]
    assert [Fate(fate).name for fate in index.record_fates] == [
        *("EMBEDDED", "REJECTED", "REJECTED", "DUPLICATE", "REJECTED", "EMBEDDED")
    ]
    assert index.record_lengths.tolist() == [3, 0, 0, 3, 0, 7]
    assert index.num_invalid == 3
    assert [index.record_id(number) for number in range(6)] == list("abcdef")
    assert index.tokens.tolist() == [0, *[5] * 7, 2, 0, 20, 15, 7, 2]
    # What was changed is counted in the records that are kept.
    assert json.loads(index.attributes["letter_counts"])["lower_case"] == 1
    assert json.loads(index.attributes["letter_counts"])["trailing_stop"] == 1
    warnings = [record.getMessage() for record in caplog.records]
    named = "\n  ".join([f"{fasta}: 3 records are invalid and left out (on_invalid: skip):", *LINES])
    assert warnings == [named, "letters: trailing_stop: 1"]


@pytest.mark.parametrize("policy", [LengthPolicy("window", 8, 8, 8), LengthPolicy("full", 0, strand="both")])
def test_skipped_contigs(policy: LengthPolicy, tmp_path: Path) -> None:
    index = skipping(write(tmp_path, b">a\n-\n>b\nACGTACGTACGT\n>c\n\n>d\nACG!\n"), CONTIGS, policy)
    alone = skipping(write(tmp_path, b">b\nACGTACGTACGT\n"), CONTIGS, policy)
    assert index.record_rows.tolist() == [-1, 0, -1, -1]
    assert index.tokens.tolist() == alone.tokens.tolist()
    assert index.segment_offsets.tolist() == alone.segment_offsets.tolist()


def test_a_clean_file_gives_the_same_index_with_either_setting(tmp_path: Path) -> None:
    fasta = write(tmp_path, b">a\nMKV\n>b\nACDEF\n")
    files = []
    for on_invalid in ("fail", "skip"):
        output = tmp_path / f"{on_invalid}.h5"
        build_index(fasta, output, MODEL, LengthPolicy(), on_invalid=on_invalid)
        files.append(output.read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("text", "policy", "causes"),
    [
        (b">a\n-\n", LengthPolicy(), "1 invalid"),
        (b">a\n-\n>b\n", LengthPolicy(), "2 invalid"),
        (b">a\nMKVLA\n>b\n", LengthPolicy("reject", 4), "1 invalid, 1 longer than max_length=4"),
        (b">a\nMKVLA\n", LengthPolicy("reject", 4), "1 longer than max_length=4"),
    ],
)
def test_nothing_is_left(text: bytes, policy: LengthPolicy, causes: str, tmp_path: Path) -> None:
    fasta = write(tmp_path, text)
    with pytest.raises(SeqmillError) as caught:
        skipping(fasta, policy=policy)
    assert str(caught.value) == f"{fasta}: all records are rejected, and nothing is left to embed: {causes}"


def test_both_causes_of_rejection_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    skipping(write(tmp_path, b">a\nMKVLA\n>b\nMKVLL\n>c\n\n>d\nMK\n"), policy=LengthPolicy("reject", 4))
    first, second = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert first.endswith(
        "1 record is invalid and left out (on_invalid: skip):\n  record 3 ('c'): it has no sequence; remove it"
    )
    assert second == "longer than max_length=4 and rejected: 2 records"


@pytest.mark.parametrize("on_invalid", ["fail", "skip"])
@pytest.mark.parametrize(
    ("text", "model", "told"),
    [
        (b">a\n-\n>b\n" + b"ACGTTGCA" * 40, MODEL, "the letters are A, C, G, T, U and N: this looks like nucleotides"),
        (b">a\n-\n>b\n" + b"MKVSDHRWTY" * 5, CONTIGS, "fewer than half of the letters are A, C, G, T or U: this looks"),
        (b">a\n-\n>b\0\nMKV\n", MODEL, "record 2: the header holds a NUL byte"),
    ],
)
def test_a_wrong_file_is_one_line(text: bytes, model: str, told: str, on_invalid: str, tmp_path: Path) -> None:
    message = refusal(write(tmp_path, text), model, on_invalid)
    assert message.startswith(told)
    assert "\n" not in message
