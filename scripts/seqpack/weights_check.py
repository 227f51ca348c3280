"""Looking again at weights that were fetched: their files, their tensors, and what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from seqpack.errors import SeqpackError
from seqpack.models.registry import MODELS, NAMES, RELEASED_FILES, WEIGHTS_FOLDER, find_model
from seqpack.models.released import RELEASED, read_releases, why_not_as_published
from seqpack.models.weights import load_weights
from seqpack.models.weights_record import read_record
from seqpack.self_test import self_test


def check_weights(folder: Path = WEIGHTS_FOLDER, facts: Path = RELEASED) -> Iterator[tuple[str, bool]]:
    """Yield what is found of each released model in a folder, and whether it may be used.

    Files are held against the published digests, tensors against the record of the fetch, and the model against
    published numbers. Takes as long as reading everything.
    """
    for name, release in read_releases(facts).items():
        source = find_model(name)
        assert source.path is not None
        source = replace(source, path=folder / source.path.name)
        assert source.path is not None
        if not source.path.exists():
            continue
        try:
            published = release.sources[0].files
            files = [source.path] if name in MODELS else [source.path / file for file in RELEASED_FILES]
            wrong = [
                f"{file}: {why}" for file in files if file.exists() and (why := why_not_as_published(file, published[file.name]))
            ]
            record = read_record(source)
            tested = self_test(source, load_weights(source), release.published)
        except (SeqpackError, OSError) as error:
            yield f"{name}: {error}", False
            continue
        if wrong and (record is None or record.get("source") == release.sources[0].name):
            yield f"{name}: not as published: {'; '.join(wrong)}", False
            continue
        origin = "files as published" if not wrong else f"fetched from {record['source']}" if record else ""
        recorded = "tensors as recorded" if record else "put there by hand: no record of its tensors"
        yield f"{name}: {origin}, {recorded}; {tested}", True
