"""The record of fetched weights, resources/models/NAME.json: what they were, to compare with from then on. Light."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seqmill.errors import SeqmillError
from seqmill.spec.models import ModelSource, read_json


def record_path(source: ModelSource) -> Path:
    """Return where the record of a released model is: beside its file or folder."""
    assert source.path is not None
    return source.path.with_name(f"{source.name}.json")


def read_record(source: ModelSource) -> dict[str, Any] | None:
    """Return the record; None if there is none, as of weights that were put in place by hand.

    Raises:
        SeqmillError: it can't be read.
    """
    path = record_path(source)
    if not path.exists():
        return None
    record = read_json(path)
    kinds = {"digest": str, "source": str, "files": dict}
    if missing := [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]:
        raise SeqmillError(f"{path}: not a record of weights: it has no {missing[0]}; remove it and fetch them again")
    return record


def require_recorded(source: ModelSource, digest: str) -> None:
    """Raise a SeqmillError if a released model's tensors are not those that were recorded when it was fetched."""
    if source.kind != "released" or source.path is None:
        return
    record = read_record(source)
    if record is not None and record["digest"] != digest:
        raise SeqmillError(
            f"{source.path}: these are not the weights of {source.name} that were fetched and tested: the digest of "
            f"their tensors is {digest}, in {record_path(source)} it is {record['digest']}. Remove both and fetch "
            "them again"
        )
