"""The index of any nucleotides under any policy: one fate per record, the right segments, weights and order."""

import gzip
import hashlib
import itertools
import json
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from families import SMALL, dnabert_folder, segments_written_out, weights_of, windows_written_out
from seqmill.errors import SeqmillError
from seqmill.index.bpe import BpeTokenizer
from seqmill.index.build import build_index
from seqmill.index.segments import cut
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import UNTRAINED_TOKENIZER
from seqmill.spec.packing import choose_pack_tokens, plan_packs
from seqmill.store.index import Index, open_index
from seqmill.store.index_format import Fate

MODEL = "untrained:dnabert_s"
TOKENIZER = BpeTokenizer.from_file(UNTRAINED_TOKENIZER)
CLS, SEP = 1, 2

Entry = tuple[str, str]  # id, sequence


@dataclass
class Expected:
    """The expected result for one entry, computed one letter at a time."""

    cleaned: str
    fate: str
    first: int  # the first record with this sequence; -1 if rejected
    segments: list[str]


def expectations(entries: list[Entry], policy: LengthPolicy) -> tuple[list[Expected], Counter]:
    counts: Counter = Counter()
    firsts: dict[str, int] = {}
    expected = []
    for number, (_, sequence) in enumerate(entries):
        for letter in sequence:
            counts["lower_case"] += letter.islower()
            counts["u_to_t"] += letter in "uU"
            counts["n"] += letter in "nN"
            counts["other_iupac"] += letter.upper() in "RYSWKMBDHV"
        cleaned = sequence.upper().replace("U", "T")
        counts["records_over_10_percent_unknown"] += sum(base not in "ACGT" for base in cleaned) > 0.1 * len(cleaned)
        too_long = len(cleaned) > policy.max_length > 0
        if too_long and policy.long_sequences == "reject":
            expected.append(Expected(cleaned, "rejected", -1, []))
            continue
        first = firsts.setdefault(cleaned, number)
        fate = {"truncate": "truncated", "window": "windowed"}[policy.long_sequences] if too_long else "embedded"
        fate = fate if first == number else "duplicate"
        expected.append(Expected(cleaned, fate, first, segments_written_out(cleaned, policy)))
    return expected, counts


def tokens_of(segment: str) -> list[int]:
    """Return the tokens of one segment, tokenized separately."""
    return TOKENIZER.encode([segment.encode()])[0].tolist()


def build(
    entries: list[Entry], policy: LengthPolicy, model: str = MODEL, compress: bool = False, on_invalid: str = "fail"
) -> Index:
    """Build in a temporary folder; the mapped index stays readable after the folder is removed."""
    text = "".join(f">{id_}\n{sequence[:37]}\n{sequence[37:]}\n" for id_, sequence in entries).encode()
    with tempfile.TemporaryDirectory() as folder:
        fasta = Path(folder, "input.fna")
        fasta.write_bytes(gzip.compress(text) if compress else text)
        build_index(fasta, Path(folder, "index.h5"), model, policy, on_invalid=on_invalid)
        return open_index(Path(folder, "index.h5"))


IDS = st.text("abc|/.", max_size=5)
FEW = st.text("ACgu", min_size=1, max_size=4)  # few letters, so that equal sequences occur
MANY = st.text("ACGTacgtuUN", min_size=1, max_size=80) | st.text("ACGTURYSWKMBDHVNrysn", min_size=1, max_size=15)


@st.composite
def variants(draw: st.DrawFn, sequence: str) -> str:
    """The same sequence under the policy, or almost the same."""
    change = draw(st.sampled_from(["same", "lower", "rna", "dna", "shorter", "twice", "other strand"]))
    return {
        "same": sequence,
        "lower": sequence.lower(),
        "rna": sequence.replace("T", "U"),
        "dna": sequence.replace("U", "T").replace("u", "t"),
        "shorter": sequence[:-1] or sequence,
        "twice": sequence * 2,
        "other strand": segments_written_out(sequence.upper().replace("U", "T"), replace(WHOLE, strand="both"))[1],
    }[change]


@st.composite
def entry_lists(draw: st.DrawFn) -> list[Entry]:
    base = draw(st.lists(FEW | MANY, min_size=1, max_size=8))
    chosen = draw(st.lists(st.sampled_from(base).flatmap(variants), min_size=1, max_size=16))
    # A sample with fewer bases than other IUPAC codes except N looks like a protein; no record here does.
    return [(draw(IDS), sequence) for sequence in chosen if codes(sequence) <= bases(sequence)] or [("", "A")]


def bases(sequence: str) -> int:
    return sum(letter in "ACGTU" for letter in sequence.upper())


def codes(sequence: str) -> int:
    return sum(letter in "RYSWKMBDHV" for letter in sequence.upper())


@st.composite
def policies(draw: st.DrawFn) -> LengthPolicy:
    kind = draw(st.sampled_from(["truncate", "window", "window", "full", "reject"]))
    max_length = 0 if kind == "full" else draw(st.sampled_from([1, 2, 7, 30, 79, 10_000]))
    window = draw(st.integers(1, min(max_length, 40))) if kind == "window" else 0
    stride = draw(st.integers(max(1, window // 4), window)) if kind == "window" else 0
    return LengthPolicy(kind, max_length, window, stride, draw(st.sampled_from(["forward", "both"])))


WHOLE = LengthPolicy("full", 0)
GENERATOR = np.random.default_rng(8)
# Several packs; a contig of 150 windows with its own pack; a contig of N only.
CONTIGS = [
    (f"c{number}", "".join(GENERATOR.choice(list("ACGT"), length)))
    for number, length in enumerate([40, 3000, 900, 1, 900, 4500, 2000])
]
CONTIGS += [
    ("n", "N" * 500),
    ("codes", "RYSWKMBDHVN" * 9),
    ("again", CONTIGS[5][1].lower()),
    ("other", "T" + CONTIGS[5][1]),
]


def _check_with_invalid_records(entries: list[Entry], policy: LengthPolicy, alone: Index) -> None:
    """Records that are skipped change nothing else."""
    index = build([("bad", "A-C"), *entries, ("bad", "")], policy, on_invalid="skip")
    assert index.record_fates.tolist() == [Fate.REJECTED, *alone.record_fates.tolist(), Fate.REJECTED]
    assert index.record_rows.tolist() == [-1, *alone.record_rows.tolist(), -1]
    for name in ("tokens", "token_offsets", "sequence_segments", "segment_offsets", "segment_lengths", "pack_offsets"):
        assert np.array_equal(getattr(index, name), getattr(alone, name)), name


@given(entry_lists(), policies())
@example(CONTIGS, LengthPolicy("window", 300, 300, 300))
@example(CONTIGS, LengthPolicy("window", 500, 300, 30, "both"))
@example(CONTIGS, LengthPolicy("full", 0, strand="both"))
@example(CONTIGS, LengthPolicy("reject", 900))
@settings(max_examples=60, deadline=None)
def test_index_of_any_nucleotides(entries: list[Entry], policy: LengthPolicy):
    expected, counts = expectations(entries, policy)
    if all(record.fate == "rejected" for record in expected):
        with pytest.raises(SeqmillError, match=rf"all records are rejected.*: {len(entries):,} longer"):
            build(entries, policy)
        return
    index = build(entries, policy)
    _check_with_invalid_records(entries, policy, index)

    # Every record has one fate, and the counts add up.
    assert [Fate(fate).name.lower() for fate in index.record_fates] == [record.fate for record in expected]
    fates = json.loads(index.attributes["fate_counts"])
    assert fates == {fate.name.lower(): [r.fate for r in expected].count(fate.name.lower()) for fate in Fate}
    assert sum(fates.values()) == len(entries) == index.num_records == index.attributes["num_records"]
    letters = json.loads(index.attributes["letter_counts"])
    changes = ("lower_case", "u_to_t", "n", "other_iupac", "records_over_10_percent_unknown")
    assert letters == {change: counts[change] for change in changes}
    assert [index.record_id(number) for number in range(len(entries))] == [id_ for id_, _ in entries]
    assert index.record_lengths.tolist() == [len(record.cleaned) for record in expected]

    # Each record's row leads to the tokens of its segments, each tokenized separately, and to their weights.
    assert index.tokens.dtype == np.uint16
    assert index.has_segments == any(len(record.segments) > 1 for record in expected)
    for record, row in zip(expected, index.record_rows.tolist(), strict=True):
        if record.fate == "rejected":
            assert row == -1
            continue
        assert index.sequence_records[row] == record.first
        segments = [segment.tolist() for segment in index.row_segments(row)]
        assert segments == [tokens_of(segment) for segment in record.segments]
        for tokens in segments:
            assert (tokens[0], tokens[-1]) == (CLS, SEP)
        weights = index.row_weights(row).tolist()
        expected_weights = weights_of(record.segments)
        assert weights == (expected_weights if index.has_segments else [1])
        assert (
            index.sequence_digests[row].tobytes() == hashlib.blake2b(record.cleaned.encode(), digest_size=16).digest()
        )

    # Sequences share a row exactly when they are equal once cleaned.
    rows = {(record.cleaned, row) for record, row in zip(expected, index.record_rows.tolist(), strict=True) if row >= 0}
    assert len(rows) == len(dict(rows)) == index.num_sequences == index.attributes["num_sequences"]

    # Rows are in descending order of tokens, ties in order of first appearance; the totals are those of the rows.
    uniques = {number: record for number, record in enumerate(expected) if record.first == number}
    sizes = {number: sum(len(tokens_of(s)) for s in record.segments) for number, record in uniques.items()}
    order = sorted(uniques, key=lambda number: (-sizes[number], number))
    assert index.sequence_records.tolist() == order
    assert np.diff(index.token_offsets).tolist() == [sizes[number] for number in order]
    assert index.attributes["num_tokens"] == len(index.tokens) == sum(sizes.values())
    assert index.attributes["num_segments"] == sum(len(record.segments) for record in uniques.values())
    kept = [
        min(len(r.cleaned), policy.max_length if policy.long_sequences == "truncate" else 1 << 60)
        for r in uniques.values()
    ]
    assert index.attributes["num_residues"] == sum(kept)
    assert index.max_tokens == max(len(tokens_of(s)) for record in uniques.values() for s in record.segments)
    check_packs(index)


def check_packs(index: Index) -> None:
    """A pack has whole sequences, and its segments are those of the rows."""
    pack_tokens = index.attributes["pack_tokens"]
    assert pack_tokens == choose_pack_tokens(len(index.tokens))
    assert index.pack_offsets.tolist() == plan_packs(index.token_offsets, pack_tokens).tolist()
    segment = 0
    for pack, (first, last) in enumerate(itertools.pairwise(index.pack_offsets.tolist())):
        rows = [index.row_segments(row) for row in range(first, last)]
        flat = [tokens.tolist() for segments in rows for tokens in segments]
        assert index.pack_tokens(pack).tolist() == [token for tokens in flat for token in tokens]
        assert index.pack_lengths(pack).tolist() == [len(tokens) for tokens in flat]
        assert index.first_segment(pack) == segment
        told = index.pack_segments(pack)
        assert (told is not None) == index.has_segments
        if told is not None:
            begins, weights = told
            assert begins.tolist() == [0, *itertools.accumulate(map(len, rows))][:-1]
            assert weights.tolist() == [w for row in range(first, last) for w in index.row_weights(row).tolist()]
        for row, segments in zip(range(first, last), rows, strict=True):
            for _ in segments:
                assert index.row_of_segment(segment) == row
                segment += 1
    assert segment == index.attributes["num_segments"]


@given(st.text("ACGTRYKMBVDHSWN", min_size=1, max_size=100), policies())
@settings(max_examples=150, deadline=None)
def test_segments_match_the_written_out_cut(sequence: str, policy: LengthPolicy):
    """The package cuts the same windows as the test; every base is in one."""
    if len(sequence) <= policy.max_length or policy.long_sequences not in ("window", "full"):
        policy = LengthPolicy("full", 0, strand=policy.strand)
    found = cut(sequence.encode(), policy.window, policy.stride, policy.strand)
    assert [segment.decode() for segment in found] == windows_written_out(sequence, policy)
    forward = found[: len(found) // 2] if policy.strand == "both" else found
    together = "".join(segment.decode()[: policy.stride or None] for segment in forward[:-1]) + forward[-1].decode()
    assert together == sequence


@given(entry_lists(), st.data())
@settings(max_examples=12, deadline=None)
def test_digest_changes_with_the_content(entries: list[Entry], data: st.DataObject):
    policy = LengthPolicy("window", 20, 10, 5)
    digest = build(entries, policy).digest
    assert build(entries, policy, compress=True).digest == digest
    number = data.draw(st.integers(0, len(entries) - 1))
    id_, sequence = entries[number]
    place = data.draw(st.integers(0, len(sequence) - 1))
    letter = data.draw(st.sampled_from("ACG").filter(lambda letter: letter != sequence[place].upper()))
    for changed in (
        (id_, sequence[:place] + letter + sequence[place + 1 :]),
        (f"x{id_}", sequence),
        (f"{id_} more", sequence),
    ):
        assert build([*entries[:number], changed, *entries[number + 1 :]], policy).digest != digest
    assert build([*entries, entries[number]], policy).digest != digest


def test_digest_changes_with_each_setting_and_with_the_tokenizer(tmp_path: Path):
    """Even if the setting affects only other, longer sequences."""
    other = tmp_path / "other"
    shutil.copytree(dnabert_folder(SMALL), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    entries = [("a", "ACGTAC"), ("b", "GGT")]
    policies = [
        LengthPolicy("window", 20, 20, 20),
        LengthPolicy("window", 21, 20, 20),
        LengthPolicy("window", 20, 19, 19),
        LengthPolicy("window", 20, 20, 19),
        LengthPolicy("window", 20, 20, 20, "both"),
        LengthPolicy("truncate", 20),
        LengthPolicy("truncate", 20, strand="both"),
        LengthPolicy("reject", 20),
        LengthPolicy("full", 0),
    ]
    digests = {build(entries, policy).digest for policy in policies}
    digests.add(build(entries, policies[0], str(other)).digest)
    assert len(digests) == len(policies) + 1
    # The model's name and weights are not in the digest: an index serves all models with the same tokenizer.
    assert build(entries, policies[0], str(dnabert_folder(SMALL))).digest in digests


def test_a_sequence_and_its_reverse_complement_are_two(tmp_path: Path):
    """Although their segments on both strands differ only in order."""
    index = build([("a", "AACCGGGT"), ("b", "ACCCGGTT")], LengthPolicy("full", 0, strand="both"))
    assert index.record_rows.tolist() == [0, 1]
    one, other = (sorted(tokens.tolist() for tokens in index.row_segments(row)) for row in (0, 1))
    assert one == other
