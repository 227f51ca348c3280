"""The first merges in NumPy: with any tokenizer and any sequence, the library's own tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from seqmill.index.first_merges import SYMBOLS, FirstMerges, split_first_merges
from seqmill.spec.models import UNTRAINED_TOKENIZER

few = settings(max_examples=60, deadline=None)


def trained(words: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def plain(tokenizer: Tokenizer, sequences: list[bytes]) -> list[list[int]]:
    return [tokenizer.encode(sequence.decode(), add_special_tokens=False).ids for sequence in sequences]


def after_first_merges(tokenizer: Tokenizer, sequences: list[bytes]) -> list[list[int]]:
    merges, rest = split_first_merges(tokenizer)
    return [rest.encode(text, add_special_tokens=False).ids for text in merges.apply(sequences)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(UNTRAINED_TOKENIZER))


def changed(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], None]) -> Tokenizer:
    content = json.loads(tokenizer.to_str())
    change(content)
    return Tokenizer.from_str(json.dumps(content))


def test_merges_by_hand() -> None:
    merges = FirstMerges([(ord("A"), ord("A"), 1), (ord("C"), ord("G"), 2), (ord("A"), ord("C"), 3)])
    expected = {
        **{"A": "A", "AA": "\1", "AAA": "\1A", "AAAA": "\1\1", "AAAAACG": "\1\1A\2", "AAC": "\1C"},
        **{"ACG": "A\2", "AC": "\3", "": "", "NCGACN": "N\2\3N", "GAA": "G\1", "AG": "AG"},
    }
    assert merges.apply([sequence.encode() for sequence in expected]) == list(expected.values())


def test_merges_do_not_reach_into_the_next_sequence() -> None:
    merges = FirstMerges([(ord("A"), ord("A"), 1), (ord("A"), ord("C"), 2)])
    assert merges.apply([b"A", b"A", b"C", b"A", b"AA", b"A"]) == ["A", "A", "C", "A", "\1", "A"]


@few
@given(st.lists(st.text("ACGTN", min_size=20, max_size=60), min_size=3, max_size=8), st.integers(8, 60), st.randoms())
def test_tokens_are_the_librarys_for_any_tokenizer(words: list[str], vocabulary: int, generator: random.Random) -> None:
    tokenizer = trained(words, vocabulary)
    letters = generator.choice([b"ACGT", b"AAAAC", b"AT", b"ACGTNRY"])  # runs and repeats are where orders differ
    sequences = [bytes(generator.choices(letters, k=length)) for length in (0, 1, 2, 30, 200)]
    assert after_first_merges(tokenizer, sequences) == plain(tokenizer, sequences)


@pytest.mark.parametrize("unit", ["A", "C", "AT", "AAT", "AAAC", "ACGT", "N", "AN", "GGCC", "AAATTT"])
def test_tokens_are_the_librarys_in_repeats(unit: str, tokenizer: Tokenizer) -> None:
    sequences = [(unit * length)[:length].encode() for length in (*range(1, 40), 1001)]
    assert after_first_merges(tokenizer, sequences) == plain(tokenizer, sequences)


def test_the_committed_tokenizer_begins_with_merges_of_two_letters(tokenizer: Tokenizer) -> None:
    merges, _ = split_first_merges(tokenizer)
    assert len(merges.merges) == 10
    sequence = bytes(random.Random(1).choices(b"ACGT", k=100_000))
    (text,) = merges.apply([sequence])
    assert len(text) < 0.65 * len(sequence)


def parted_pair(content: dict[str, Any]) -> None:
    content["model"]["vocab"] = {word: id_ for id_, word in enumerate(["[UNK]", *"ACGT", "AC", "CG", "ACG"])}
    content["model"]["merges"] = [["A", "C"], ["C", "G"], ["A", "CG"]]


def merge_of_three_first(content: dict[str, Any]) -> None:
    content["model"]["merges"].sort(key=lambda merge: len("".join(merge)) == 2)


def lower_case(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def letter_by_letter(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": "T"},
        "behavior": "Isolated",
        "invert": False,
    }


def added_token_of_letters(content: dict[str, Any]) -> None:
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 4096, "content": "CCC"})


def end_of_word(content: dict[str, Any]) -> None:
    content["model"]["end_of_word_suffix"] = "</w>"


def symbol_in_the_vocabulary(content: dict[str, Any]) -> None:
    content["model"]["vocab"][f"{SYMBOLS[:1].decode()}A"] = 4096


@pytest.mark.parametrize(
    "change",
    [
        *(parted_pair, merge_of_three_first, lower_case, letter_by_letter, added_token_of_letters, end_of_word),
        symbol_in_the_vocabulary,
    ],
)
def test_tokenizers_that_do_more_are_left_alone(change: Callable[[dict[str, Any]], None], tokenizer: Tokenizer) -> None:
    other = changed(tokenizer, change)
    merges, _ = split_first_merges(other)
    assert merges.merges == []
    sequences = [b"ACGTTTCCCACGCG", b"A", b"N"]
    assert after_first_merges(other, sequences) == plain(other, sequences)


def test_at_most_as_many_merges_as_there_are_symbols() -> None:
    words = ["".join(random.Random(seed).choices("ACGTRYKM", k=400)) for seed in range(5)]
    tokenizer = trained(words, 80)
    merges, _ = split_first_merges(tokenizer)
    assert len(merges.merges) == len(SYMBOLS)
    sequences = [word.encode() for word in words]
    assert after_first_merges(tokenizer, sequences) == plain(tokenizer, sequences)
