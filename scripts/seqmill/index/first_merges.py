"""The first merges of byte-pair encoding, done for a whole batch at once, so that the library has half as many to do.

The library keeps a heap of all adjacent pairs and takes the one of least rank, leftmost first. Merges that join two
letters cannot be made possible by others, since what a merge makes is no letter: as long as the ranking begins with
such merges, doing them one after another over the whole text is the same. From there the library goes on with the
remaining merges, in which every pair of letters so merged is written as one symbol. The tokens are the same; the tests
compare them.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

SYMBOLS = bytes([*range(1, 9), *range(14, 22)])  # control characters: in no sequence and in no vocabulary
MERGED = 0  # in the place of a pair's second letter
ONE_WORD = (None, "Whitespace", "WhitespaceSplit")  # pre-tokenizers that leave a sequence of letters whole


@dataclass(frozen=True)
class FirstMerges:
    """Merges of two letters, by rank: the letters and the symbol for the pair, as bytes; there may be none."""

    merges: list[tuple[int, int, int]]

    def apply(self, sequences: list[bytes]) -> list[str]:
        """Return the sequences (ASCII letters) with these merges done: what the remaining tokenizer takes."""
        text = np.frombuffer(bytearray(b"\n".join(sequences)), np.uint8)
        left, right = text[:-1], text[1:]
        for first, second, symbol in self.merges:
            found = (left == first) & (right == second)
            if first == second:
                places = _leftmost(found)
                text[places] = symbol
                text[places + 1] = MERGED
            else:  # as differences, which are several times faster than assignment through a mask
                left -= found.view(np.uint8) * np.uint8(first - symbol)
                right -= found.view(np.uint8) * np.uint8(second - MERGED)
        return text.tobytes().translate(None, bytes([MERGED])).decode("ascii").split("\n")


def split_first_merges(tokenizer: Tokenizer) -> tuple[FirstMerges, Tokenizer]:
    """Return a BPE tokenizer's first merges, and a tokenizer that gives the same ids, CLS and SEP left out, after them.

    Where a tokenizer does more to a sequence than merge its letters, or a later merge would part a pair: no merges,
    and the tokenizer itself.
    """
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    first = list(itertools.takewhile(_joins_letters, model["merges"]))[: len(SYMBOLS)]
    symbols = {left + right: chr(symbol) for (left, right), symbol in zip(first, SYMBOLS, strict=False)}

    def rewritten(token: str) -> str:
        for pair, symbol in symbols.items():
            token = token.replace(pair, symbol)
        return token

    rest = [[rewritten(part) for part in merge] for merge in model["merges"][len(first) :]]
    whole = (rewritten("".join(merge)) for merge in model["merges"][len(first) :])
    if not _only_merges(content) or any("".join(merge) != token for merge, token in zip(rest, whole, strict=True)):
        return FirstMerges([]), tokenizer
    model["vocab"] = {rewritten(token): id_ for token, id_ in model["vocab"].items()}
    model["unk_token"] = rewritten(model["unk_token"])
    model["merges"] = rest
    # No sequence holds an added token, and a sequence is one word: nothing to search for.
    content |= {"added_tokens": [], "pre_tokenizer": None, "post_processor": None}
    merges = [(ord(pair[0]), ord(pair[1]), ord(symbol)) for pair, symbol in symbols.items()]
    return FirstMerges(merges), Tokenizer.from_str(json.dumps(content))


def _joins_letters(merge: list[str]) -> bool:
    return all(len(part) == 1 and "A" <= part <= "Z" for part in merge)


def _only_merges(content: dict[str, Any]) -> bool:
    model = content["model"]
    return (
        content["normalizer"] is None
        and (content["pre_tokenizer"] or {}).get("type") in ONE_WORD
        and not any(token["content"].isalpha() for token in content["added_tokens"])
        and not model["continuing_subword_prefix"]
        and not model["end_of_word_suffix"]
        and set(SYMBOLS.decode()).isdisjoint("".join(model["vocab"]))
    )


def _leftmost(found: np.ndarray) -> np.ndarray:
    """Return where pairs of a letter with itself are merged: in a run of such places every other one, from the left."""
    places = np.flatnonzero(found)
    order = np.arange(len(places))
    run_begins = np.where(np.diff(places, prepend=-2) > 1, order, 0)
    return places[(order - np.maximum.accumulate(run_begins)) % 2 == 0]
