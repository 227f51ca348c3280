"""The merge refuses a damaged status JSON by name, or gives the right embeddings.

Bytes are flipped, cut, and inserted; keys are dropped, renamed, and given values of wrong types and sizes.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from damage import damaged, failures
from test_fuzz_hdf5 import check_message, copy_of, merged

from pipeline import Run
from seqmill.errors import SeqmillError

DEEP = 100_000
ODD_VALUES: list[Callable[[], Any]] = [
    lambda: None,
    lambda: True,
    lambda: -1,
    lambda: 10**30,
    lambda: 1e308,
    lambda: float("nan"),
    lambda: 0.5,
    lambda: "",
    lambda: "x" * 100_000,
    lambda: "\ud800",
    lambda: "a\0b",
    lambda: "line\nbreak",
    list,
    dict,
    lambda: [1, "a", None],
    lambda: {"a": {"b": [{}]}},
    lambda: {"verdict": "pass", "sequences": "many"},
    lambda: {"num_sequences": "none"},
]
ODD_TEXTS = [
    "",
    "null",
    "[]",
    "0",
    '"complete"',
    "{}",
    "{" * DEEP,
    "[" * DEEP + "]" * DEEP,
    '{"rank": ' * 5000 + "0" + "}" * 5000,
    '{"rank": ' + "9" * 10_000 + "}",
    "\ufeff{}",
    "NaN",
    '{"rank": 0, "rank": 1}',
]


def mutated(content: dict[str, Any], random_: random.Random) -> str:
    """Change one or two keys, at the top level or nested."""
    for _ in range(random_.choice([1, 1, 2])):
        inside = content
        while (
            inner := [value for value in inside.values() if isinstance(value, dict) and value]
        ) and random_.random() < 0.5:
            inside = random_.choice(inner)
        key = random_.choice(list(inside))
        match random_.choice(["drop", "rename", "add", "value", "value", "value", "value", "other"]):
            case "drop":
                del inside[key]
            case "rename":
                inside[f"{key}_"] = inside.pop(key)
            case "add":
                inside[random_.choice(["a", "", "\ud800", "__class__", "path\0"])] = random_.choice(ODD_VALUES)()
            case "value":
                inside[key] = random_.choice(ODD_VALUES)()
            case "other":
                inside[key] = inside[random_.choice(list(inside))]
        if not content:
            break
    return json.dumps(content)


def _judge(copy: Run, expected: dict[str, Any], stored: bytes) -> None:
    copy.statuses[1].write_bytes(stored)
    try:
        found = merged(copy, copy.folder / "merged")
    except SeqmillError as error:
        check_message(error, copy.shards[1].with_suffix(""))  # names the shard or its status JSON
    else:
        different = [part for part in expected if found[part] != expected[part]]
        assert not different, f"merged, with other {different}"


def test_damaged_bytes(sound: Run, memory_folder: Path) -> None:
    copy, expected = copy_of(sound, memory_folder / "status copy"), merged(sound, memory_folder / "merged")
    data = sound.statuses[1].read_bytes()
    wrong = failures(1500, lambda seed: _judge(copy, expected, damaged(data, random.Random(seed), [])))
    shutil.rmtree(copy.folder)
    assert not wrong, wrong


def test_wrong_content(sound: Run, memory_folder: Path) -> None:
    copy, expected = copy_of(sound, memory_folder / "status copy"), merged(sound, memory_folder / "merged")
    text = sound.statuses[1].read_text()

    def attempt(seed: int) -> None:
        stored = ODD_TEXTS[seed] if seed < len(ODD_TEXTS) else mutated(json.loads(text), random.Random(seed))
        _judge(copy, expected, stored.encode())

    wrong = failures(2000, attempt)
    shutil.rmtree(copy.folder)
    assert not wrong, wrong
