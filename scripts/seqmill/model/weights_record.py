"""The record of fetched weights, resources/models/NAME.json, with which later runs compare them. Imports no torch."""

from pathlib import Path
from typing import Any

from seqmill.base.files import read_json
from seqmill.errors import SeqmillError
from seqmill.spec.models import ModelSource


def record_path(source: ModelSource) -> Path:
    """Return the path of a released model's record, next to its file or folder."""
    assert source.path is not None
    return source.path.with_name(f"{source.name}.json")


def read_record(source: ModelSource) -> dict[str, Any] | None:
    """Return the record; None if there is none, because the weights were put there by hand.

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
    """Raise a SeqmillError if a released model's tensors differ from those recorded when it was fetched."""
    if source.kind != "released" or source.path is None:
        return
    record = read_record(source)
    if record is not None and record["digest"] != digest:
        raise SeqmillError(
            f"{source.path}: these are not the weights of {source.name} that were fetched and tested: the digest of "
            f"their tensors is {digest}, but {record_path(source)} has {record['digest']}. Remove both and fetch "
            "them again"
        )
