"""Errors name wrong settings and the allowed values; valid settings are completed and normalized."""

import pytest
import yaml

from pipeline import REPOSITORY
from seqmill.errors import SeqmillError
from seqmill.run.settings import check_settings, wrong_settings

SCHEMA = yaml.safe_load((REPOSITORY / "config/schemas/config.schema.yaml").read_text())
WRONG = {
    "a key misspelt": ({"modle": "x"}, "config modle: there is no such setting; did you mean model?"),
    "a key like none": ({"xyz": 1}, "config xyz: there is no such setting; there are datasets, fasta, model, "),
    "none of the values": (
        {"pooling": "median"},
        "config pooling: 'median' is not allowed; give mean, mean_tokens, max, std, cls, or a list of these",
    ),
    "a number as text": (
        {"max_length": "500"},
        "config max_length: '500' is not allowed; give auto, or a whole number",
    ),
    "too few": ({"shards": 0}, "config shards: 0 is not allowed; give auto, or a whole number from 1 to 100000"),
    "in a list": (
        {"exports": ["xlsx"]},
        "config exports: ['xlsx'] is not allowed; give parquet, npy, csv, tsv, h5ad, h5, h5_residues, faiss, pt, or a "
        "list of these without repetitions",
    ),
    "a list with a repetition": (
        {"reuse": ["a", "a"]},
        "config reuse: ['a', 'a'] is not allowed; give text that is not empty, or a list of these without repetitions",
    ),
    "another kind": ({"device": "gpu"}, "config device: 'gpu' is not allowed; give auto, cpu, cuda"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_one_line(name: str) -> None:
    settings, said = WRONG[name]
    (line,) = wrong_settings({"layers": [-1, 3], "dtype": "float16", **settings}, SCHEMA)
    assert line.startswith(said)
    assert "\n" not in line


def test_only_the_wrong_settings_are_reported() -> None:
    assert (
        len(wrong_settings({name: value for given, _ in WRONG.values() for name, value in given.items()}, SCHEMA)) == 8
    )
    settings = yaml.safe_load((REPOSITORY / "config/config.yaml").read_text())
    assert wrong_settings(settings, SCHEMA) == []


def test_every_setting_has_a_description() -> None:
    assert all(rule.get("description") for rule in SCHEMA["properties"].values())


def test_settings_are_completed_and_normalized() -> None:
    defaults = check_settings({}, SCHEMA, [])
    assert defaults == check_settings(yaml.safe_load((REPOSITORY / "config/config.yaml").read_text()), SCHEMA, [])
    assert defaults.keys() == SCHEMA["properties"].keys()
    assert [defaults[key] for key in ("layers", "pooling", "reuse", "per_residue")] == [[-1], ["mean"], [], ""]
    given = {"layers": ["2", "-1"], "pooling": "cls", "reuse": "a.h5", "exports": "npy", "per_residue": "true"}
    given["shards"] = 1e3
    settings = check_settings(given, SCHEMA, [])
    assert settings == {
        **defaults,
        **{"layers": [2, -1], "pooling": ["cls"], "reuse": ["a.h5"], "exports": ["npy"]},
        **{"per_residue": "float16", "shards": 1000},
    }
    assert type(settings["shards"]) is int
    assert check_settings({"per_residue": "False"}, SCHEMA, [])["per_residue"] == ""
    assert check_settings({"per_residue": "float32"}, SCHEMA, [])["per_residue"] == "float32"
    assert given["layers"] == ["2", "-1"]


def test_all_wrong_settings_are_refused_at_once() -> None:
    with pytest.raises(SeqmillError) as refusal:
        check_settings({"modle": "x", "shards": 0, "layers": ["last"]}, SCHEMA, ["config/config.yaml", "mine.yaml"])
    *wrong, source = str(refusal.value).splitlines()
    assert sorted(line.split(":")[0] for line in wrong) == ["config layers", "config modle", "config shards"]
    assert source == "settings come from config/config.yaml, mine.yaml and from --config"
