"""The BPE tokenizer: its tokens equal those of the library and of the algorithm's definition; bad files are refused."""

import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from pipeline import SCRIPTS, SUPPORT
from seqmill.errors import SeqmillError
from seqmill.index import bpe
from seqmill.index.bpe import BpeTokenizer
from seqmill.index.fasta import FastaFile
from seqmill.spec.models import UNTRAINED_TOKENIZER

DATA = Path(__file__).parents[2] / "data"
UNK, CLS, SEP = 0, 1, 2


@pytest.fixture(scope="module")
def tokenizer() -> BpeTokenizer:
    return BpeTokenizer.from_file(UNTRAINED_TOKENIZER, vocabulary=4096)


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return json.loads(UNTRAINED_TOKENIZER.read_text())


def random_bases(length: int, seed: int = 1, letters: bytes = b"ACGT") -> bytes:
    return bytes(random.Random(seed).choices(letters, k=length))


def split(tokens: np.ndarray, num_tokens: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens, np.cumsum(num_tokens)[:-1])]


def merged_by_definition(sequence: str, content: dict[str, Any]) -> list[int]:
    """Byte-pair encoding of Sennrich et al. 2016 (doi:10.18653/v1/P16-1162): the earliest merge first, leftmost."""
    ranks = {tuple(pair): rank for rank, pair in enumerate(content["model"]["merges"])}
    parts = list(sequence)
    while True:
        pairs = [(ranks[pair], place) for place, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]
        if not pairs:
            return [content["model"]["vocab"].get(part, UNK) for part in parts]
        _, place = min(pairs)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def test_tokens_equal_those_of_the_definition(tokenizer: BpeTokenizer, content: dict[str, Any]) -> None:
    sequences = [random_bases(length, length, b"ACGTACGTACGTACGTNR") for length in (1, 2, 3, 17, 100, 300)]
    found = split(*tokenizer.encode(sequences))
    assert found == [[CLS, *merged_by_definition(sequence.decode(), content), SEP] for sequence in sequences]


def test_tokens_equal_those_of_the_library(tokenizer: BpeTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "BATCH_BYTES", 5000)  # several batches, one with a single sequence
    lengths = (1, 5, 4000, 255, 256, 257, 300, 12_000, 2, 80)
    sequences = [random_bases(length, length, b"ACGT" * 20 + b"NRYK") for length in lengths]
    tokens, num_tokens = tokenizer.encode(sequences)
    plain = Tokenizer.from_file(str(UNTRAINED_TOKENIZER))
    assert split(tokens, num_tokens) == [plain.encode(sequence.decode()).ids for sequence in sequences]
    assert (tokens.dtype, num_tokens.dtype) == (np.uint16, np.int32)


def test_every_base_is_in_one_token(tokenizer: BpeTokenizer, content: dict[str, Any]) -> None:
    sequence = random_bases(10_000)
    words = {token: word for word, token in content["model"]["vocab"].items()}
    (tokens,) = split(*tokenizer.encode([sequence]))
    assert "".join(words[token] for token in tokens[1:-1]) == sequence.decode()


def test_no_sequences_and_no_bases(tokenizer: BpeTokenizer) -> None:
    tokens, num_tokens = tokenizer.encode([])
    assert (tokens.shape, tokens.dtype, num_tokens.shape, num_tokens.dtype) == ((0,), np.uint16, (0,), np.int32)
    assert split(*tokenizer.encode([b"", b"A", b""]))[::2] == [[CLS, SEP], [CLS, SEP]]
    assert split(*tokenizer.encode([b""])) == [[CLS, SEP]]


def test_unknown_letters_are_one_token_each(tokenizer: BpeTokenizer) -> None:
    assert split(*tokenizer.encode([b"N" * 1000])) == [[CLS, *[UNK] * 1000, SEP]]
    (tokens,) = split(*tokenizer.encode([b"ANRYA"]))
    assert tokens[2:5] == [UNK] * 3


def test_a_long_contig_is_one_sequence(tokenizer: BpeTokenizer) -> None:
    sequence = random_bases(1_000_000)
    tokens, num_tokens = tokenizer.encode([sequence])
    assert num_tokens.tolist() == [len(tokens)]
    assert np.count_nonzero(tokens <= SEP) == 2
    assert 4 < len(sequence) / len(tokens) < 6  # random DNA is the worst case for four letters
    (beginning,) = split(*tokenizer.encode([sequence[:5000]]))
    assert tokens[:900].tolist() == beginning[:900]  # distant bases do not affect merges


def test_attributes(tokenizer: BpeTokenizer) -> None:
    assert tokenizer.path == UNTRAINED_TOKENIZER
    assert tokenizer.name == "bpe"
    assert tokenizer.digest == hashlib.sha256(UNTRAINED_TOKENIZER.read_bytes()).hexdigest()
    assert tokenizer.vocabulary == 4096


def test_truncation_padding_and_dropout_in_the_file_are_ignored(
    tokenizer: BpeTokenizer, content: dict[str, Any], tmp_path: Path
) -> None:
    content = content | {
        "truncation": {"direction": "Right", "max_length": 10, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 5000},
            "direction": "Right",
            "pad_to_multiple_of": None,
            **{"pad_id": 3, "pad_type_id": 0, "pad_token": "[PAD]"},
        },
        "model": content["model"] | {"dropout": 0.5},
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    sequences = [random_bases(2000), b"ACG"]
    expected = tokenizer.encode(sequences)
    found = BpeTokenizer.from_file(path).encode(sequences)
    assert [array.tolist() for array in found] == [array.tolist() for array in expected]


def no_template(content: dict[str, Any]) -> None:
    content["post_processor"] = None


def swapped_template(content: dict[str, Any]) -> None:
    content["post_processor"]["single"].reverse()


def no_cls(content: dict[str, Any]) -> None:
    no_template(content)
    content["added_tokens"] = []
    del content["model"]["vocab"]["[CLS]"]


def no_unk(content: dict[str, Any]) -> None:
    content["model"]["unk_token"] = None


def missing_unk(content: dict[str, Any]) -> None:
    content["model"]["unk_token"] = "[unknown]"


def word_piece(content: dict[str, Any]) -> None:
    content["model"] = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": content["model"]["vocab"],
    }


def many_ids(content: dict[str, Any]) -> None:
    content["model"]["vocab"] |= {f"A{number}": number for number in range(4096, 70_000)}


def one_id_too_many(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["NNN"] = 4096


def one_id_twice(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["AA"] = content["model"]["vocab"]["CC"]


def unknown_merge(content: dict[str, Any]) -> None:
    content["model"]["merges"][0] = ["Q", "Z"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (no_template, "[CLS] sequence [SEP]"),
        (swapped_template, "[CLS] sequence [SEP]"),
        (no_cls, "[CLS] sequence [SEP]"),
        (no_unk, "no unk_token"),
        (missing_unk, "no unk_token"),
        (word_piece, "WordPiece"),
        (many_ids, "70,000 ids"),
        (one_id_too_many, "4,097 ids and the model knows 4,096"),
        (one_id_twice, "the same id"),
        (unknown_merge, "not a tokenizer.json"),
    ],
)
def test_tokenizers_that_are_refused(
    change: Callable[[dict[str, Any]], None], told: str, content: dict[str, Any], tmp_path: Path
) -> None:
    changed = json.loads(json.dumps(content))
    change(changed)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(changed))
    message = refusal(path)
    assert told in message


@pytest.mark.parametrize(
    "stored", [b"", b"not JSON", b"{}", b"[]", b"\xff\xfe\0\0", UNTRAINED_TOKENIZER.read_bytes()[:5000]]
)
def test_files_that_are_not_tokenizers(stored: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(stored)
    assert "not a tokenizer.json" in refusal(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no such tokenizer; copy the one that came with the model" in refusal(tmp_path / "tokenizer.json")
    assert re.search("no such tokenizer; run `.*fetch.* dnabert_s`", refusal(tmp_path / "dnabert_s/tokenizer.json"))
    assert "cannot be read: Is a directory" in refusal(tmp_path)


def refusal(path: Path) -> str:
    with pytest.raises(SeqmillError) as caught:
        BpeTokenizer.from_file(path, vocabulary=4096)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.full
def test_the_committed_tokenizer_equals_the_output_of_its_script(tmp_path: Path) -> None:
    output = tmp_path / "tokenizer.json"
    script = SUPPORT / "make_untrained_tokenizer.py"
    command = [sys.executable, str(script), "--fasta", str(DATA / "NC_005816.fna"), "--output", str(output)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(SCRIPTS)})
    assert output.read_bytes() == UNTRAINED_TOKENIZER.read_bytes()


def test_the_committed_tokenizer_is_like_that_of_dnabert_s(tokenizer: BpeTokenizer, content: dict[str, Any]) -> None:
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    assert special == {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3, "[MASK]": 4}
    assert content["pre_tokenizer"] == {"type": "Whitespace"}
    (record,) = [record for block in FastaFile(DATA / "NC_005816.fna").blocks() for record in block]
    plasmid = record.body.translate(None, b"\n")
    tokens, _ = tokenizer.encode([plasmid])
    assert 4.5 < len(plasmid) / len(tokens) < 5.5
