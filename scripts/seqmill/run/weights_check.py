"""Looking again at the released weights of a folder: their files, their tensors, and what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from seqmill.base.files import sha256_of_file
from seqmill.errors import SeqmillError
from seqmill.model.weights import load_weights
from seqmill.model.weights_record import read_record
from seqmill.run.self_test import self_test
from seqmill.spec.models import WEIGHTS_FOLDER, ModelSource, find_model
from seqmill.spec.released import RELEASED, Release, read_releases, why_not_as_published


def check_weights(folder: Path = WEIGHTS_FOLDER, facts: Path = RELEASED) -> Iterator[tuple[str, bool]]:
    """Yield what is found of each released model in a folder, and whether it may be used.

    Files are held against the published digests, tensors against the record of the fetch, and the model against
    published numbers. All bytes are read.
    """
    for name, release in read_releases(facts).items():
        source = find_model(name)
        assert source.path is not None
        source = replace(source, path=folder / source.path.name)
        if (folder / source.path.name).exists():
            try:
                yield f"{name}: {_examine(source, release)}", True
            except (SeqmillError, OSError) as error:
                yield f"{name}: {error}", False


def _examine(source: ModelSource, release: Release) -> str:
    record = read_record(source)
    for file in source.files:
        _require_known(file, source.name, release, record)
    tested = self_test(source, load_weights(source), release.published)
    recorded = f"fetched from {record['source']}" if record else "put there by hand, without a record of its tensors"
    return f"{recorded}; files and tensors are right; {tested}"


def _require_known(file: Path, name: str, release: Release, record: dict[str, Any] | None) -> None:
    """Raise a SeqmillError if a file is neither as published nor the one that was written when it was fetched."""
    fact = release.sources[0].files.get(file.name)
    wrong = why_not_as_published(file, fact) if fact else "no file of this name is published"
    if wrong and (record is None or record["files"].get(file.name, {}).get("sha256") != sha256_of_file(file)):
        raise SeqmillError(f"{file}: not that of {name} as published: {wrong}; remove it and fetch it again")
