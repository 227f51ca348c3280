"""The index of any FASTA: one fate per record, the right tokens in the right order, a valid pack plan."""

import gzip
import hashlib
import itertools
import json
import random
import re
import tempfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from seqmill.errors import SeqmillError
from seqmill.index.build import build_index
from seqmill.index.order import unique_sequences
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.packing import (
    MAX_PACK_TOKENS,
    MIN_PACK_TOKENS,
    choose_pack_tokens,
    packs_of_rank,
    plan_packs,
    rows_of_rank,
)
from seqmill.store.index import Index, open_index
from seqmill.store.index_format import Fate
from sequences import record_descriptions

MODEL = "untrained:esm2_t6_8M_UR50D"

# fair-esm's alphabet, written out here to detect errors in the package's own table.
TOKENS = dict(zip("LAGVSERTIDPKQNFYMHWCXBUZO", range(4, 29), strict=True))
CLS, EOS = 0, 2

Entry = tuple[str, str]  # header, sequence


@dataclass
class Expected:
    """The expected result for one entry, computed one letter at a time."""

    id: str
    description: str
    cleaned: str
    kept: str  # what enters the model
    fate: str
    first: int  # the first record with this sequence


def expectations(entries: list[Entry], policy: LengthPolicy) -> tuple[list[Expected], Counter]:
    counts: Counter = Counter()
    firsts: dict[str, int] = {}
    expected = []
    for number, (header, sequence) in enumerate(entries):
        cleaned = ""
        for position, letter in enumerate(sequence):
            counts["lower_case"] += "a" <= letter <= "z"
            if letter == "*" and position == len(sequence) - 1:
                counts["trailing_stop"] += 1
            elif letter == "*":
                counts["inner_stop_to_x"] += 1
                cleaned += "X"
            elif letter in "jJ":
                counts["j_to_x"] += 1
                cleaned += "X"
            else:
                cleaned += letter.upper()
        too_long = len(cleaned) > policy.max_length
        if too_long and policy.long_sequences == "reject":
            fate = "rejected"
        elif cleaned in firsts:
            fate = "duplicate"
        else:
            fate = "truncated" if too_long else "embedded"
            firsts[cleaned] = number
        id_, description = re.fullmatch(r"[ \t\v\f]*([^ \t\v\f]*)(.*)", header, re.DOTALL).groups()
        kept = "" if fate == "rejected" else cleaned[: policy.max_length]
        expected.append(
            Expected(id_, description.strip(" \t\v\f"), cleaned, kept, fate, firsts.get(cleaned, -1)),
        )
    return expected, counts


def fasta_text(entries: list[Entry], seed: int = 0) -> bytes:
    """Write the entries in lines of random length with either line ending and stray blanks."""
    layout = random.Random(seed)
    text = b""
    for header, sequence in entries:
        newline = layout.choice([b"\n", b"\r\n"])
        text += b">" + header.encode() + newline
        while sequence:
            width = layout.randint(1, 60)
            text += sequence[:width].encode() + layout.choice([b"", b" ", newline]) + newline
            sequence = sequence[width:]
    return text


def build(
    entries: list[Entry],
    policy: LengthPolicy,
    name: str = "input.fasta",
    text: bytes | None = None,
    on_invalid: str = "fail",
) -> Index:
    """Build in a temporary folder; the mapped index stays readable after the folder is removed."""
    with tempfile.TemporaryDirectory() as folder:
        fasta = Path(folder, name)
        fasta.write_bytes(fasta_text(entries) if text is None else text)
        output = Path(folder, "index.h5")
        build_index(fasta, output, MODEL, policy, on_invalid=on_invalid)
        return open_index(output)


def sequence_tokens(index: Index, row: int) -> list[int]:
    return index.tokens[index.token_offsets[row] : index.token_offsets[row + 1]].tolist()


# Control characters except line ends and NUL are legal in a header.
HEADERS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0"), max_size=20)
SHORT = st.text("ACJ*", min_size=1, max_size=3)  # few letters, so that equal sequences occur
LONG = st.text("LAGVSERTIDPKQNFYMHWCXBUZOJ*lagvsertidpkqnfymhwcxbuzoj", min_size=1, max_size=60)


@st.composite
def variants(draw: st.DrawFn, sequence: str) -> str:
    """The same sequence under the policy, or almost the same."""
    change = draw(st.sampled_from(["same", "lower", "stop", "x", "j", "shorter"]))
    return {
        "same": sequence,
        "lower": sequence.lower(),
        "stop": sequence + "*",
        "x": sequence.replace("J", "X"),
        "j": sequence.replace("X", "J"),
        "shorter": sequence[:-1] or sequence,
    }[change]


@st.composite
def entry_lists(draw: st.DrawFn) -> list[Entry]:
    base = draw(st.lists(SHORT | LONG, min_size=1, max_size=12))
    chosen = draw(st.lists(st.sampled_from(base).flatmap(variants), min_size=1, max_size=30))
    sequences = [sequence for sequence in chosen if sequence != "*"] or ["M"]
    # 200 letters with 98 % A, C, G, T, U and N are refused as nucleotides. Stay far from that, so that a letter may be
    # changed and a record added.
    letters = "".join(sequences).upper()
    assume(len(letters) < 100 or sum(letter not in "ACGTUN" for letter in letters) > 0.05 * len(letters) + 1)
    headers = draw(st.lists(HEADERS, min_size=len(sequences), max_size=len(sequences)))
    return list(zip(headers, sequences, strict=True))


POLICIES = st.builds(LengthPolicy, st.sampled_from(["truncate", "reject"]), st.sampled_from([1, 2, 5, 20, 59, 1022]))

MANY = [(f"s{number}", random.Random(number).choice("ACDK") * (number % 61 + 1)) for number in range(300)]
LONG_ONES = [
    ("short", "MKV"),
    ("giant", "MKVLA" * 500),
    ("long", "AC" * 600),
    ("giant again", "MKVLA" * 500),
    ("", "W"),
]


@given(entry_lists(), POLICIES)
@example(MANY, LengthPolicy("truncate", 50))
@example(MANY, LengthPolicy("reject", 50))
@example(LONG_ONES, LengthPolicy("truncate", 2400))  # a sequence longer than a pack
@settings(max_examples=200, deadline=None)
def test_index_of_any_fasta(entries: list[Entry], policy: LengthPolicy):
    expected, counts = expectations(entries, policy)
    if all(record.fate == "rejected" for record in expected):
        with pytest.raises(SeqmillError, match=rf"all records are rejected.*: {len(entries):,} longer"):
            build(entries, policy)
        return
    index = build(entries, policy)

    # Every record has one fate, and the counts add up.
    assert index.num_records == len(entries)
    assert [Fate(fate).name.lower() for fate in index.record_fates] == [record.fate for record in expected]
    fate_counts = json.loads(index.attributes["fate_counts"])
    assert fate_counts == {fate.name.lower(): [r.fate for r in expected].count(fate.name.lower()) for fate in Fate}
    assert sum(fate_counts.values()) == len(entries) == index.attributes["num_records"]
    assert json.loads(index.attributes["letter_counts"]) == {
        change: counts[change] for change in ("lower_case", "trailing_stop", "inner_stop_to_x", "j_to_x")
    }

    # Ids and descriptions are kept; lengths are those before truncation.
    assert [index.record_id(number) for number in range(len(entries))] == [record.id for record in expected]
    assert record_descriptions(index) == [record.description for record in expected]
    assert index.record_lengths.tolist() == [len(record.cleaned) for record in expected]

    # Each record's row has the tokens of its sequence.
    for record, row in zip(expected, index.record_rows.tolist(), strict=True):
        if record.fate == "rejected":
            assert row == -1
        else:
            assert sequence_tokens(index, row) == [CLS, *(TOKENS[letter] for letter in record.kept), EOS]
            assert index.sequence_records[row] == record.first
            assert index.sequence_id(row) == expected[record.first].id

    # Unique sequences are in descending order of tokens; ties are in order of first appearance.
    uniques = [(-len(record.kept), number) for number, record in enumerate(expected) if record.first == number]
    assert index.sequence_records.tolist() == [number for _, number in sorted(uniques)]
    assert index.num_sequences == len(uniques) == index.attributes["num_sequences"]
    assert index.max_tokens == 2 - min(uniques)[0]
    assert index.token_offsets[0] == 0
    assert index.token_offsets[-1] == len(index.tokens) == index.attributes["num_tokens"]
    assert index.attributes["num_residues"] == -sum(length for length, _ in uniques)

    # Rows are shared, and digests agree, exactly when the cleaned sequences do.
    digests = [digest.tobytes() for digest in index.sequence_digests]
    rows = index.record_rows.tolist()
    alike = {(r.cleaned, row, digests[row]) for r, row in zip(expected, rows, strict=True) if r.fate != "rejected"}
    assert len(alike) == index.num_sequences
    for values in zip(*alike, strict=True):
        assert len(set(values)) == index.num_sequences
    for cleaned, _, digest in alike:
        tokens = bytes(TOKENS[letter] for letter in cleaned)
        assert digest == hashlib.blake2b(tokens, digest_size=16).digest()
    for number, fate in enumerate(index.record_fates):
        if fate == Fate.DUPLICATE:
            assert index.sequence_records[index.record_rows[number]] < number

    check_plan(index.token_offsets, index.pack_offsets, index.attributes["pack_tokens"])
    assert index.num_packs == len(index.pack_offsets) - 1 == index.attributes["num_packs"]
    assert index.attributes["pack_tokens"] == choose_pack_tokens(len(index.tokens))
    together = []
    for pack in range(index.num_packs):
        tokens = index.pack_tokens(pack)  # checks the checksum
        assert zlib.crc32(tokens.tobytes()) == index.pack_checksums[pack]
        assert index.pack_lengths(pack).sum() == len(tokens)
        together.extend(tokens.tolist())
    assert together == index.tokens.tolist()


@given(entry_lists(), st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["", "*", "M-K", "1"])), max_size=5))
@settings(max_examples=60, deadline=None)
def test_skipped_records_change_nothing_else(entries: list[Entry], invalid: list[tuple[int, str]]):
    policy = LengthPolicy("truncate", 30)
    mixed = [(header, sequence, True) for header, sequence in entries]
    for place, sequence in invalid:
        mixed.insert(place, ("bad", sequence, False))
    index = build([(header, sequence) for header, sequence, _ in mixed], policy, on_invalid="skip")
    alone = build(entries, policy)
    is_good = np.array([good for *_, good in mixed])
    assert (index.record_rows[is_good] == alone.record_rows).all()
    assert (index.record_fates[is_good] == alone.record_fates).all()
    assert (index.record_fates[~is_good] == Fate.REJECTED).all()
    assert (index.record_rows[~is_good] == -1).all()
    assert not index.record_lengths[~is_good].any()
    assert index.num_invalid == len(invalid)
    for name in ("tokens", "token_offsets", "sequence_digests", "pack_offsets", "pack_checksums"):
        assert np.array_equal(getattr(index, name), getattr(alone, name)), name
    assert index.attributes["letter_counts"] == alone.attributes["letter_counts"]


def check_plan(token_offsets: np.ndarray, pack_offsets: np.ndarray, pack_tokens: int) -> None:
    """Packs cover all sequences in order; each is as full as possible; ranks divide the packs."""
    num_sequences = len(token_offsets) - 1
    assert pack_offsets[0] == 0
    assert pack_offsets[-1] == num_sequences
    assert (np.diff(pack_offsets) > 0).all()
    offsets = token_offsets.tolist()
    for first, last in itertools.pairwise(pack_offsets.tolist()):
        assert last == first + 1 or offsets[last] - offsets[first] <= pack_tokens
        assert last == num_sequences or offsets[last + 1] - offsets[first] > pack_tokens
    num_packs = len(pack_offsets) - 1
    for world_size in (1, 2, 3, 8, num_packs + 1):
        rows = [rows_of_rank(pack_offsets, rank, world_size) for rank in range(world_size)]
        assert sorted(np.concatenate(rows).tolist()) == list(range(num_sequences))
        for rank in range(world_size):
            packs = packs_of_rank(num_packs, rank, world_size)
            assert rows[rank].dtype == np.int64
            assert rows[rank].tolist() == [
                row for pack in packs for row in range(pack_offsets[pack], pack_offsets[pack + 1])
            ]


HALVES = st.sampled_from([bytes(8), b"\x01" + bytes(7), bytes(7) + b"\x01", b"\xff" * 8])
DIGESTS = st.builds(bytes.__add__, HALVES, HALVES)


@given(st.lists(st.tuples(DIGESTS, st.booleans()), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_unique_sequences_with_any_digests(records: list[tuple[bytes, bool]]):
    """Sequences whose digests agree in only one half are different."""
    assume(not all(rejected for _, rejected in records))
    lengths = {digest: digest[0] % 3 + digest[-1] % 2 for digest, _ in records}
    firsts: dict[bytes, int] = {}
    for number, (digest, rejected) in enumerate(records):
        if not rejected:
            firsts.setdefault(digest, number)
    order = sorted(firsts, key=lambda digest: (-lengths[digest], firsts[digest]))
    first_records, rows = unique_sequences(
        np.frombuffer(b"".join(digest for digest, _ in records), np.uint8).reshape(-1, 16),
        np.array([lengths[digest] for digest, _ in records], np.int64),
        np.array([rejected for _, rejected in records]),
    )
    assert first_records.tolist() == [firsts[digest] for digest in order]
    assert rows.tolist() == [-1 if rejected else order.index(digest) for digest, rejected in records]


@given(st.lists(st.integers(1, 200), max_size=80) | st.lists(st.integers(1, 10**12), max_size=30), st.data())
@settings(max_examples=300, deadline=None)
def test_plan_of_any_lengths(lengths: list[int], data: st.DataObject):
    pack_tokens = data.draw(st.integers(1, 2 * max(lengths, default=1)) | st.just(sum(lengths) or 1))
    token_offsets = np.cumsum([0, *lengths], dtype=np.int64)
    check_plan(token_offsets, plan_packs(token_offsets, pack_tokens), pack_tokens)


@given(st.integers(0, 1 << 45), st.integers(0, 1 << 45))
@settings(max_examples=200, deadline=None)
def test_pack_tokens_grow_with_the_input(one: int, other: int):
    small, large = choose_pack_tokens(min(one, other)), choose_pack_tokens(max(one, other))
    assert MIN_PACK_TOKENS <= small <= large <= MAX_PACK_TOKENS
    for tokens in (small, large):
        assert tokens & (tokens - 1) == 0


@given(entry_lists(), st.integers(1, 1000))
@settings(max_examples=25, deadline=None)
def test_digest_does_not_depend_on_container_path_or_layout(entries: list[Entry], seed: int):
    policy = LengthPolicy("truncate", 30)
    index = build(entries, policy)
    text = fasta_text(entries)
    for other in (
        build(entries, policy, "other name.fa"),
        build(entries, policy, text=gzip.compress(text)),
        build(entries, policy, text=fasta_text(entries, seed)),
    ):
        assert other.digest == index.digest
        assert other.attributes["source_path"] != index.attributes["source_path"]


@given(entry_lists(), st.data())
@settings(max_examples=30, deadline=None)
def test_digest_changes_with_the_content(entries: list[Entry], data: st.DataObject):
    policy = LengthPolicy("truncate", 30)
    digest = build(entries, policy).digest
    number = data.draw(st.integers(0, len(entries) - 1))
    header, sequence = entries[number]

    position = data.draw(st.integers(0, len(sequence) - 1))
    letter = data.draw(st.sampled_from("ACW").filter(lambda letter: letter != sequence[position].upper()))
    edited = sequence[:position] + letter + sequence[position + 1 :]
    assert build([*entries[:number], (header, edited), *entries[number + 1 :]], policy).digest != digest

    longer = [*entries[:number], (f"x{header}", sequence), *entries[number + 1 :]]  # changes an id or makes one
    assert build(longer, policy).digest != digest

    described = [*entries[:number], (f"{header} x y", sequence), *entries[number + 1 :]]
    assert build(described, policy).digest != digest

    assert build([*entries, (header, sequence)], policy).digest != digest
    assert build(entries, LengthPolicy("truncate", 31)).digest != digest


@given(entry_lists(), st.data())
@settings(max_examples=25, deadline=None)
def test_digest_changes_with_the_order(entries: list[Entry], data: st.DataObject):
    policy = LengthPolicy("truncate", 30)
    shuffled = data.draw(st.permutations(entries))
    one, other = (
        [(record.id, record.description, record.cleaned) for record in expectations(each, policy)[0]]
        for each in (entries, shuffled)
    )
    assume(one != other)
    assert build(entries, policy).digest != build(shuffled, policy).digest


def test_digest_changes_with_the_policy_for_long_sequences():
    entries = [("a", "MKV"), ("b", "MKVLA")]
    digests = {
        build(entries, LengthPolicy(long_sequences, max_length)).digest
        for long_sequences in ("truncate", "reject")
        for max_length in (3, 4, 5, 1022)
    }
    assert len(digests) == 8


def test_records_with_equal_stored_tokens_may_be_two_sequences():
    index = build([("a", "MKVLA"), ("b", "MKVLW"), ("c", "MKV"), ("d", "mkvla*")], LengthPolicy("truncate", 3))
    assert index.record_rows.tolist() == [0, 1, 2, 0]
    assert [Fate(fate) for fate in index.record_fates] == [
        Fate.TRUNCATED,
        Fate.TRUNCATED,
        Fate.EMBEDDED,
        Fate.DUPLICATE,
    ]


def test_a_damaged_pack_is_noticed():
    index = build(MANY, LengthPolicy())
    tokens = np.array(index.tokens)
    tokens[len(tokens) // 2] ^= 1
    damaged = Index(**{**vars(index), "tokens": tokens})
    refused = []
    for pack in range(damaged.num_packs):
        try:
            damaged.pack_tokens(pack)
        except SeqmillError:
            refused.append(pack)
    assert len(refused) == 1
    first, last = index.pack_offsets[refused[0]], index.pack_offsets[refused[0] + 1]
    assert index.token_offsets[first] <= len(tokens) // 2 < index.token_offsets[last]
