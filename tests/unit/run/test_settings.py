"""Wrong settings are told by name, with what is allowed, and right ones are not."""

from __future__ import annotations

import pytest
import yaml

from pipeline import REPOSITORY
from seqmill.run.settings import wrong_settings

SCHEMA = yaml.safe_load((REPOSITORY / "config/schemas/config.schema.yaml").read_text())
WRONG = {
    "a key misspelt": ({"modle": "x"}, "config modle: there is no such setting; did you mean model?"),
    "a key like none": ({"xyz": 1}, "config xyz: there is no such setting; config/README.md has all of them"),
    "none of the values": ({"pooling": "median"}, "config pooling: 'median' is not allowed; From one vector"),
    "a number as text": ({"max_length": "500"}, "config max_length: '500' is not allowed; Longest sequence"),
    "too few": ({"shards": 0}, "config shards: 0 is not allowed; Number of shards of each dataset, 1 or more"),
    "in a list": ({"exports": ["csv"]}, "config exports: 'csv' is not one of ['parquet', "),
    "a list with a repetition": ({"reuse": ["a", "a"]}, "config reuse: ['a', 'a'] is not allowed; Earlier results"),
    "another kind": ({"device": "gpu"}, "config device: 'gpu' is not one of ['auto', 'cpu', 'cuda']; auto takes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_told_in_one_line(name: str) -> None:
    settings, said = WRONG[name]
    (line,) = wrong_settings({"layers": [-1, 3], "dtype": "float16", **settings}, SCHEMA)
    assert line.startswith(said)
    assert "\n" not in line


def test_every_wrong_setting_is_told_and_no_right_one() -> None:
    assert (
        len(wrong_settings({name: value for given, _ in WRONG.values() for name, value in given.items()}, SCHEMA)) == 8
    )
    settings = yaml.safe_load((REPOSITORY / "config/config.yaml").read_text())
    assert wrong_settings(settings, SCHEMA) == []


def test_what_is_allowed_is_told_of_every_key() -> None:
    assert all(rule.get("description") for rule in SCHEMA["properties"].values())
