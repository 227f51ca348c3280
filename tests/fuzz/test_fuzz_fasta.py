"""Any bytes as a FASTA file give an index with every record, or one short error and no leftover files.

A naive second reader (`oracle`) decides which. Nothing else may happen: no other exception, no hang,
no partial output, no temporary file. There are about 10,000 cases, the same in every run.
"""

import csv
import gzip
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import oracle
import pytest
from fasta_files import CHANGES, CONTAINERS, FILES, GOOD_FILES, bgzip_member, changed, parts_of, zstd
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline import MODEL, SCRIPTS
from seqmill.errors import SeqmillError
from seqmill.index.build import build_index
from seqmill.index.fasta import FastaFile, FastaRecord
from seqmill.merge.records import write_records
from seqmill.spec.lengths import LengthPolicy
from seqmill.store.index import Index, open_index
from seqmill.store.index_format import Fate
from sequences import record_descriptions

HANG_SECONDS = 20
LONGEST_MESSAGE = 1000  # characters, without the path of the file


class Hang(BaseException):
    """A case took too long; no `except Exception` may swallow it."""


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"a case took more than {HANG_SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check(
    parent: Path,
    stored: bytes,
    policy: LengthPolicy,
    on_invalid: str = "fail",
    *,
    text: bytes | bool | None = True,
    model: str = MODEL,
) -> bool:
    """Build an index from the stored bytes and check the outcome; return whether an index was built.

    `text` is the decompressed text, or None if the bytes must be refused; with True the oracle decides.
    """
    text = oracle.decompressed(stored) if text is True else text
    said = None if text is None else oracle.read(text, known=oracle.PROTEIN_MODELS[model].letters)
    with work_folder(parent) as folder, time_limit():
        fasta, output = folder / "input.fa", folder / "index.h5"
        fasta.write_bytes(stored)
        try:
            build_index(fasta, output, model, policy, on_invalid=on_invalid)
        except SeqmillError as error:
            check_message(str(error), fasta, said, on_invalid)
            assert names_in(folder) == ["input.fa"]
            if not oracle.refuses(said, policy, on_invalid):
                raise AssertionError(
                    f"refused, though the oracle reads {said and len(said)} records: {error}"
                ) from None
            return False
        assert names_in(folder) == ["index.h5", "input.fa"]
        assert said is not None
        assert not oracle.refuses(said, policy, on_invalid), "an index was built, though the oracle refuses the file"
        index = open_index(output)
        compare(index, said, policy, oracle.PROTEIN_MODELS[model])
        write_records(folder / "records.tsv.gz", index)
        compare_table(folder / "records.tsv.gz", index, said, policy)
        return True


def check_message(message: str, fasta: Path, said: list[oracle.Said] | None, on_invalid: str) -> None:
    """One line, or, if several records are invalid, one for each of the first 20."""
    invalid = [number for number, one in enumerate(said or [], start=1) if not one.letters]
    assert message.startswith(f"{fasta}: ")
    first, *lines = message.removeprefix(f"{fasta}: ").split("\n  ")
    assert all(line.isprintable() and len(line) < LONGEST_MESSAGE for line in (first, *lines))
    if "truncated or damaged" in first:  # the oracle is more tolerant
        invalid = []
    if on_invalid == "skip" or len(invalid) < 2:
        assert not lines
        assert not invalid or on_invalid == "skip" or first.startswith(f"record {invalid[0]} (")
    else:
        assert first.startswith(f"{len(invalid)} records are invalid; ")
        assert [int(line.split()[1]) for line in lines[:20]] == invalid[:20]
        assert lines[20:] == ([f"and {len(invalid) - 20} more"] if len(invalid) > 20 else [])


def compare(index: Index, said: list[oracle.Said], policy: LengthPolicy, of_model: oracle.Tokens) -> None:
    assert index.num_records == len(said)
    numbers = range(len(said))
    assert [index.record_id(number) for number in numbers] == [one.id for one in said]
    assert record_descriptions(index) == [one.description for one in said]
    assert index.record_lengths.tolist() == [len(one.letters) for one in said]
    fates = json.loads(index.attributes["fate_counts"])
    assert sum(fates.values()) == len(said)
    rows: dict[bytes, int] = {}
    for one, fate, row in zip(said, index.record_fates.tolist(), index.record_rows.tolist(), strict=True):
        if one.is_rejected(policy):
            assert (fate, row) == (Fate.REJECTED, -1)
            continue
        # Equal sequences, and no others, share a row, which decodes to their letters.
        assert rows.setdefault(one.letters, row) == row
        start, end = index.token_offsets[row : row + 2]
        tokens = index.tokens[start:end].tolist()
        letters = [of_model.first + of_model.letters.index(letter) for letter in one.letters[: policy.max_length]]
        assert tokens == [*of_model.before, *letters, *of_model.after]
    assert len(set(rows.values())) == len(rows) == index.num_sequences
    firsts = [said[record].letters for record in index.sequence_records.tolist()]
    assert firsts == sorted(rows, key=rows.__getitem__)
    together = [token for pack in range(index.num_packs) for token in index.pack_tokens(pack).tolist()]
    assert together == index.tokens.tolist()


def compare_table(table: Path, index: Index, said: list[oracle.Said], policy: LengthPolicy) -> None:
    text = gzip.decompress(table.read_bytes()).decode("utf-8")
    header, *lines = csv.reader(text.split("\n")[:-1], "excel-tab", lineterminator="\n", strict=True)
    assert len(lines) == len(said)
    row_numbers = itertools.count()
    first_of: dict[bytes, int] = {}
    for number, (line, one) in enumerate(zip(lines, said, strict=True), start=1):
        row = dict(zip(header, line, strict=True))
        assert (int(row["record"]), row["id"], row["description"]) == (number, one.id, one.description)
        assert int(row["length"]) == len(one.letters)
        too_long = len(one.letters) > policy.max_length
        if one.is_rejected(policy):
            expected = ("rejected", "0", "", "")
        else:
            first = first_of.setdefault(one.letters, number)
            fate = "duplicate" if first != number else "truncated" if too_long else "embedded"
            embedded = str(min(len(one.letters), policy.max_length))
            expected = (fate, embedded, str(next(row_numbers)), str(first) if first != number else "")
        assert (row["fate"], row["embedded_length"], row["row"], row["same_as"]) == expected
        assert bool(row["reason"]) == (too_long or not one.letters)
    assert next(row_numbers) == (index.record_rows >= 0).sum()


POLICIES = st.builds(LengthPolicy, st.sampled_from(["truncate", "reject"]), st.sampled_from([1, 3, 50, 1022, 1 << 19]))

ON_INVALID = st.sampled_from(["fail", "skip"])
MODELS = st.sampled_from(list(oracle.PROTEIN_MODELS))

HEALTH = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


def cases(number: int) -> settings:
    return settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=HEALTH)


@given(FILES, POLICIES, ON_INVALID, MODELS)
@example(b"", LengthPolicy(), "skip", MODEL)
@example(b">", LengthPolicy(), "skip", MODEL)
@example(b"\xef\xbb\xbf", LengthPolicy(), "fail", MODEL)
@example(b">" + b"x" * 100_000 + b"\n1", LengthPolicy(), "fail", MODEL)
@example((b">" + b"x" * 100_000 + b"\n1\n") * 30, LengthPolicy(), "fail", MODEL)
@cases(3500)
def test_structured_files(
    memory_folder: Path, stored: bytes, policy: LengthPolicy, on_invalid: str, model: str
) -> None:
    check(memory_folder, stored, policy, on_invalid, model=model)


@given(GOOD_FILES, st.lists(CHANGES, min_size=1, max_size=4), POLICIES, ON_INVALID, MODELS)
@cases(2500)
def test_mutated_files(
    memory_folder: Path, good: bytes, changes: list, policy: LengthPolicy, on_invalid: str, model: str
) -> None:
    check(memory_folder, changed(good, changes), policy, on_invalid, model=model)


@given(GOOD_FILES, GOOD_FILES, st.floats(0, 1), st.floats(0, 1))
@cases(500)
def test_spliced_files(memory_folder: Path, one: bytes, other: bytes, end: float, start: float) -> None:
    check(memory_folder, one[: int(end * len(one))] + other[int(start * len(other)) :], LengthPolicy())


MAGICS = st.sampled_from(
    [b"", b">", b">a\n", b"\x1f\x8b", b"\x1f\x8b\x08\x04", b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18", b"BZh", b"\x89HDF"]
)


@given(MAGICS, st.binary(max_size=200), POLICIES)
@cases(1000)
def test_random_bytes(memory_folder: Path, magic: bytes, rest: bytes, policy: LengthPolicy) -> None:
    stored = magic + rest
    said = True
    if stored.startswith((b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18")) and oracle.decompressed(stored) is not None:
        said = None  # a skippable frame, or the start of one, has no text
    check(memory_folder, stored, policy, text=said)


@given(GOOD_FILES, st.sampled_from(sorted(CONTAINERS)))
@cases(500)
def test_sound_containers(memory_folder: Path, good: bytes, container: str) -> None:
    check(memory_folder, CONTAINERS[container](good), LengthPolicy(), text=good)


@given(GOOD_FILES, st.sampled_from(sorted(CONTAINERS)), st.lists(CHANGES, min_size=1, max_size=2))
@cases(2500)
def test_damaged_containers(memory_folder: Path, good: bytes, container: str, changes: list) -> None:
    """An index is built only from a whole text, or from whole members that decompress to whole records."""
    stored = changed(CONTAINERS[container](good), changes)
    if stored == CONTAINERS[container](good):
        check(memory_folder, stored, LengthPolicy(), text=good)
        return
    try:
        built = check(memory_folder, stored, LengthPolicy())
    except AssertionError as error:
        # A file with a missing end may be refused, although the oracle's tolerant functions read it.
        if not str(error).startswith("refused, though") or "truncated or damaged" not in str(error):
            raise
        return
    if built and container == "bgzip" and stored[12:14] == b"BC":
        assert stored.endswith(bgzip_member(b"")), "a bgzip file without its end mark was taken for whole"


@given(GOOD_FILES, st.integers(0, 3))
@cases(200)
def test_bgzip_cut_between_blocks(memory_folder: Path, good: bytes, kept: int) -> None:
    stored = b"".join(bgzip_member(part) for part in parts_of(good)[:kept])
    check(memory_folder, stored, LengthPolicy(), text=None)


@given(FILES | st.builds(changed, GOOD_FILES, st.lists(CHANGES, max_size=3)), st.integers(1, 40))
@cases(1000)
def test_the_block_size_does_not_matter(memory_folder: Path, stored: bytes, block_bytes: int) -> None:
    """The block size changes neither the records nor whether the file is refused."""
    path = memory_folder / "blocks.fa"
    path.write_bytes(stored)
    assert _records_of(path, block_bytes) == _records_of(path, 8 << 20)


def _records_of(path: Path, block_bytes: int) -> list[FastaRecord] | None:
    try:
        found = [record for block in FastaFile(path).blocks(block_bytes) for record in block]
    except SeqmillError:
        return None
    return [FastaRecord(one.number, one.id, one.description, one.body.translate(None, oracle.WHITE)) for one in found]


PROGRAM_FILES = [
    ("sound", b">a x\nMKV\n>b\nMKV*\n", True),
    ("empty", b"", False),
    ("NUL", b">a\0\nMKV\n", False),
    ("old Mac", b">a\rMKV\r>b\rMKV\r", False),
    ("long header", b">" + b"y" * 1_000_000 + b"\n-\n", False),
    ("escape in the id", b">\x1b[31mred\x07\nM1\n", False),
    ("line separators in the id", ">a\u2028b\x85c\nM1\n".encode(), False),
    ("no UTF-8", b">\xff\xfe\nMKV\n", True),
    ("UTF-16", ">a\nMKV\n".encode("utf-16"), False),
    ("FASTQ", b"@a\nMKV\n+\nIII\n", False),
    ("cut gzip", gzip.compress(b">a\nMKV\n" * 99)[:-9], False),
    ("cut zstd", zstd(b">a\nMKV\n" * 99)[:-2], False),
    ("zstd of a huge window", b"\x28\xb5\x2f\xfd\x04\xff\0\0\0", False),
    ("random", random.Random(0).randbytes(3000), False),
]


@pytest.mark.parametrize(("stored", "good"), [case[1:] for case in PROGRAM_FILES], ids=[c[0] for c in PROGRAM_FILES])
def test_the_program(memory_folder: Path, stored: bytes, good: bool) -> None:
    with work_folder(memory_folder) as folder:
        fasta = folder / "input.fa"
        fasta.write_bytes(stored)
        _run_program(folder, fasta, good)


@pytest.mark.parametrize(
    "name",
    [b"\xff.fa", b"line\nbreak.fa", b"-.fa", b"a'b\".fa", "é𝛼.fa".encode(), b"{x}.fa"],
)
def test_the_program_and_odd_file_names(memory_folder: Path, name: bytes) -> None:
    with work_folder(memory_folder) as folder:
        fasta = folder / os.fsdecode(name)
        fasta.write_bytes(b">a\nMKV\n")
        _run_program(folder, fasta, True)


def _run_program(folder: Path, fasta: Path, good: bool) -> None:
    output = folder / "index.h5"
    command = [sys.executable, SCRIPTS / "build_index.py", f"--fasta={fasta}", f"--model={MODEL}", f"--output={output}"]
    done = subprocess.run(command, capture_output=True, timeout=120)
    log = done.stderr.decode("utf-8", "backslashreplace")
    assert "Traceback" not in log
    assert done.returncode == (0 if good else 1), log
    assert names_in(folder) == sorted([fasta.name, *(["index.h5"] if good else [])])
    if good:
        assert open_index(output).num_records >= 1
    else:
        assert fasta.name in log
        assert len(log.splitlines()) == 1
        assert len(log) < LONGEST_MESSAGE + len(str(fasta))
