"""The settings of a run: checked against their schema, completed with its defaults."""

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jsonschema import Draft202012Validator

from seqmill.errors import SeqmillError

LISTS = ("layers", "pooling", "reuse", "exports")
PATHS = ("datasets", "metadata", "container")  # those of fasta, model and reuse are expanded where they are looked for


def check_settings(config: Mapping[str, Any], schema: Mapping[str, Any], files: Iterable[str]) -> dict[str, Any]:
    """Return the settings in one form: `LISTS` are lists, ~ is expanded in `PATHS`, per_residue is a dtype or empty.

    Args:
        config: the settings as Snakemake reads them; from the command line some are still text.
        schema: see `wrong_settings`; each property has a default as well.
        files: the configuration files, for the error.

    Raises:
        SeqmillError: settings are unknown or not allowed; a line for each.
    """
    settings = {key: _typed(key, value) for key, value in config.items()}
    if wrong := wrong_settings(settings, schema):
        raise SeqmillError("\n".join([*wrong, f"settings come from {', '.join(files)} and from --config"]))
    settings = {key: value["default"] for key, value in schema["properties"].items()} | settings
    residues = settings["per_residue"]
    settings["per_residue"] = {True: "float16", False: ""}.get(residues, residues)
    for key in LISTS:
        if not isinstance(settings[key], list):
            settings[key] = [settings[key]]
    for key in (key for key in PATHS if isinstance(settings[key], str)):
        settings[key] = os.path.expanduser(settings[key])  # noqa: PTH111  (Path's raises an error for ~nobody)
    return settings


def _typed(key: str, value: Any) -> Any:  # noqa: ANN401
    """Return a value as YAML would have read it from a file, with 1e3 as an integer."""
    if isinstance(value, float) and value.is_integer():  # JSON Schema takes it for an integer
        return int(value)
    if key == "layers" and isinstance(value, list):
        return [int(layer) if re.fullmatch(r"-?\d+", str(layer)) else layer for layer in value]
    if key == "per_residue" and value in ("true", "True", "false", "False"):
        return value.lower() == "true"
    return value


def wrong_settings(settings: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    """Return a line for each unknown key and each forbidden value, with the allowed ones.

    The schema is a JSON Schema (2020-12) of an object.
    """
    lines = []
    for error in Draft202012Validator(schema).iter_errors(settings):
        if error.validator == "additionalProperties":
            lines += [_unknown(key, list(schema["properties"])) for key in settings if key not in schema["properties"]]
            continue
        key = str(error.absolute_path[0])
        allowed = allowed_values(schema["properties"][key])
        lines.append(f"config {key}: {error.instance!r} is not allowed; give {allowed}")
    return lines


def allowed_values(rule: Mapping[str, Any]) -> str:
    """Return the values that a rule of the schema allows, in words."""
    if options := rule.get("oneOf", rule.get("anyOf")):
        # A list is always one of several values of the other kind.
        words = [
            "a list of these without repetitions" if option.get("type") == "array" else allowed_values(option)
            for option in options
        ]
        return ", or ".join(words)
    if rule.get("type") == "array":
        return f"a list without repetitions of {allowed_values(rule['items'])}"
    if values := rule.get("enum", [rule["const"]] if "const" in rule else []):
        return ", ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values)
    if rule["type"] == "object" and "properties" in rule:
        return f"{{{', '.join(rule['properties'])}}}"
    if rule["type"] == "object":
        return f"{{NAME: VALUE}}, where VALUE is {allowed_values(rule['additionalProperties'])}"
    kind = {"integer": "a whole number", "number": "a number", "string": "text"}[rule["type"]]
    if "minimum" in rule:
        return f"{kind} from {rule['minimum']} to {rule['maximum']}"
    return f"{kind} that is not empty" if "minLength" in rule else kind


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    return f"config {key}: there is no such setting; {advice}"
