"""Settings held against their schema, with what is wrong in words."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator


def wrong_settings(settings: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    """Return a line for each unknown key and each value that is not allowed, with what is.

    Args:
        settings: by their keys.
        schema: JSON Schema (2020-12) of an object, whose properties each have a description.
    """
    lines = []
    for error in Draft202012Validator(schema).iter_errors(settings):
        if error.validator == "additionalProperties":
            lines += [_unknown(key, list(schema["properties"])) for key in settings if key not in schema["properties"]]
            continue
        key, value = str(error.absolute_path[0]), settings[error.absolute_path[0]]
        # Of several alternatives the schema's own words say no more than that none fits.
        is_choice = error.validator in ("oneOf", "anyOf")
        reason = f"{value!r} is not allowed" if is_choice else error.message
        lines.append(f"config {key}: {reason}; {schema['properties'][key]['description']}")
    return lines


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    advice = f"did you mean {near[0]}?" if near else "config/README.md has all of them"
    return f"config {key}: there is no such setting; {advice}"
