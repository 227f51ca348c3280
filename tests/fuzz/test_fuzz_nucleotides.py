"""Any bytes as a nucleotide FASTA give an index with every record, or one short error.

`test_fuzz_fasta` covers compression and the file layout.
"""

from pathlib import Path

import oracle
from fasta_files import CHANGES, changed, records
from hypothesis import example, given
from hypothesis import strategies as st
from test_fuzz_fasta import ON_INVALID, cases, check_message, names_in, time_limit, work_folder

from families import segments_written_out, weights_of
from seqmill.errors import SeqmillError
from seqmill.index.bpe import BpeTokenizer
from seqmill.index.build import build_index
from seqmill.merge.records import write_records
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import UNTRAINED_TOKENIZER
from seqmill.store.index import Index, open_index
from seqmill.store.index_format import Fate
from sequences import record_descriptions

TOKENIZER = BpeTokenizer.from_file(UNTRAINED_TOKENIZER)
SEQUENCES = (
    st.text("ACGTacgtUN", min_size=1, max_size=40)
    | st.text("ACGTURYSWKMBDHVNry", min_size=1, max_size=12)
    | st.sampled_from(["A", "acgu", "NNN", "AC GT", "G" * 300, "RYSWKMBDHV", "ACGTTGCA" * 30])
)
BAD_SEQUENCES = st.sampled_from(["", "-", "AC-GT", "ACGT*", "AC1", "ACX", "MKVLA", "A\u00c9", "A>C", "\0", "10 ACGT"])
FILES = st.lists(records(SEQUENCES) | records(SEQUENCES) | records(BAD_SEQUENCES), max_size=6).map(b"".join)
GOOD_FILES = st.lists(records(SEQUENCES), min_size=1, max_size=6).map(b"".join)
POLICIES = st.sampled_from(
    [
        LengthPolicy("window", 50, 30, 20, "both"),
        LengthPolicy("window", 5, 5, 1),
        LengthPolicy("truncate", 8, strand="both"),
        LengthPolicy("full", 0),
        LengthPolicy("reject", 12),
    ]
)


def check(parent: Path, stored: bytes, policy: LengthPolicy, on_invalid: str) -> None:
    said = oracle.read(stored, nucleotides=True)
    with work_folder(parent) as folder, time_limit():
        fasta, output = folder / "input.fna", folder / "index.h5"
        fasta.write_bytes(stored)
        try:
            build_index(fasta, output, "untrained:dnabert_s", policy, on_invalid=on_invalid)
        except SeqmillError as error:
            check_message(str(error), fasta, said, on_invalid)
            assert names_in(folder) == ["input.fna"]
            if not oracle.refuses(said, policy, on_invalid):
                raise AssertionError(f"refused, though the oracle reads the file: {error}") from None
            return
        assert names_in(folder) == ["index.h5", "input.fna"]
        assert said
        assert not oracle.refuses(said, policy, on_invalid), "an index was built, though the oracle refuses the file"
        index = open_index(output)
        compare(index, said, policy)
        write_records(folder / "records.tsv.gz", index)


def compare(index: Index, said: list[oracle.Said], policy: LengthPolicy) -> None:
    numbers = range(len(said))
    assert [index.record_id(number) for number in numbers] == [one.id for one in said]
    assert record_descriptions(index) == [one.description for one in said]
    assert index.record_lengths.tolist() == [len(one.letters) for one in said]
    rows: dict[bytes, int] = {}
    for one, fate, row in zip(said, index.record_fates.tolist(), index.record_rows.tolist(), strict=True):
        if one.is_rejected(policy):
            assert (fate, row) == (Fate.REJECTED, -1)
            continue
        assert rows.setdefault(one.letters, row) == row
        segments = segments_written_out(one.letters.decode(), policy)
        expected = [TOKENIZER.encode([segment.encode()])[0].tolist() for segment in segments]
        assert [tokens.tolist() for tokens in index.row_segments(row)] == expected
        if len(segments) > 1:
            assert index.row_weights(row).tolist() == weights_of(segments)
    assert len(set(rows.values())) == len(rows) == index.num_sequences


@given(FILES, POLICIES, ON_INVALID)
@example(b">a\n" + b"RYSWKMBDHV" * 2, LengthPolicy("full", 0), "fail")
@example(b">a\n" + b"RYSWKMBDHV" * 2 + b"\n>b\n" + b"A" * 20, LengthPolicy("full", 0), "fail")
@cases(700)
def test_structured_files(memory_folder: Path, stored: bytes, policy: LengthPolicy, on_invalid: str) -> None:
    check(memory_folder, stored, policy, on_invalid)


@given(GOOD_FILES, st.lists(CHANGES, min_size=1, max_size=4), POLICIES, ON_INVALID)
@cases(500)
def test_mutated_files(memory_folder: Path, good: bytes, changes: list, policy: LengthPolicy, on_invalid: str) -> None:
    check(memory_folder, changed(good, changes), policy, on_invalid)
