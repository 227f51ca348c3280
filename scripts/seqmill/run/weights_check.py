"""Checks the released weights in a folder again: their files, their tensors, and what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from seqmill.base.files import sha256_of_file
from seqmill.errors import SeqmillError
from seqmill.model.weights import load_weights
from seqmill.model.weights_record import read_record
from seqmill.run.self_test import self_test
from seqmill.spec.models import WEIGHTS_FOLDER, ModelSource, find_model
from seqmill.spec.released import RELEASED, Release, read_releases, why_not_as_published


def check_weights(folder: Path = WEIGHTS_FOLDER, facts: Path = RELEASED) -> Iterator[tuple[str, bool]]:
    """Yield what is found on each released model in a folder, and whether it may be used.

    Reads all bytes: files must have the published digests, tensors that of their record, and the model must compute
    the published numbers.
    """
    for name, release in read_releases(facts).items():
        source = find_model(name)
        assert source.path is not None
        source = replace(source, path=folder / source.path.name)
        if (folder / source.path.name).exists():
            try:
                yield f"{name}: {_check(source, release)}", True
            except (SeqmillError, OSError) as error:
                yield f"{name}: {error}", False


def _check(source: ModelSource, release: Release) -> str:
    record = read_record(source)
    for file in source.files:  # as published, or as recorded if it was converted from another file
        fact = release.sources[0].files.get(file.name)
        wrong = why_not_as_published(file, fact) if fact else "no file of this name is published"
        if wrong and (record is None or record["files"].get(file.name, {}).get("sha256") != sha256_of_file(file)):
            raise SeqmillError(f"{file}: not that of {source.name} as published: {wrong}; remove it and fetch it again")
    tested = self_test(source, load_weights(source), release.published)
    recorded = f"fetched from {record['source']}" if record else "put there by hand, without a record of its tensors"
    return f"{recorded}; files and tensors are right; {tested}"
