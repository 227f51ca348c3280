"""Reading many texts of a column at once gives the same texts as reading them one by one."""

import numpy as np
import pytest

from seqmill.base.text_columns import LONG, split_bytes, split_texts, texts_end_to_end

TEXTS = ["", "a", "", "Ünïcødé-蛋白", "sp|P12345|TEST_HUMAN", "x" * 10, "", "\x00", "a b\tc", "z" * 300, ""]


def column(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


@pytest.mark.parametrize("texts", [TEXTS, [text for text in TEXTS if text.isascii()]], ids=["any", "ASCII"])
@pytest.mark.parametrize(
    "rows",
    [[], [0], [3], [1, 2, 3, 4], [8, 7, 6], [5, 5, 5], [0, 2, 6], [9, 1, 4, 3, 0], list(range(8))],
    ids=str,
)
def test_any_rows_in_any_order(texts: list[str], rows: list[int]):
    wanted = [texts[row % len(texts)] for row in rows]
    joined, bounds = texts_end_to_end(*column(texts), np.array([row % len(texts) for row in rows], np.int64))
    assert joined == "".join(wanted).encode()
    assert split_texts(joined, bounds) == wanted
    assert split_bytes(joined, bounds) == [text.encode() for text in wanted]


def test_long_texts_out_of_order():
    texts = [letter * (LONG + 1 + number) for number, letter in enumerate("abcdé")]
    joined, bounds = texts_end_to_end(*column(texts), np.array([4, 0, 2], np.int64))
    assert split_texts(joined, bounds) == [texts[4], texts[0], texts[2]]


def test_random_rows_of_many():
    generator = np.random.default_rng(1)
    texts = ["é" * int(count) + str(number) for number, count in enumerate(generator.integers(0, 9, 5000))]
    rows = generator.permutation(5000)[:3000]
    joined, bounds = texts_end_to_end(*column(texts), rows)
    assert split_texts(joined, bounds) == [texts[row] for row in rows]
