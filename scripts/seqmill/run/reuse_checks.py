"""Checks of the setting `reuse` before any job runs: do earlier results fit the settings? (docs/how-to/reuse.md)"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seqmill.base.hdf5 import open_hdf5, read_attributes
from seqmill.errors import SeqmillError
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import ModelSource
from seqmill.spec.outputs import Outputs
from seqmill.store.layout import RunFolder
from seqmill.store.reuse import TAKE_OUT, Source, bring_back, open_noted, open_source, require_dtype, require_same


def known_settings(model: ModelSource, policy: LengthPolicy, outputs: Outputs, precision: str) -> dict[str, Any]:
    """Return the settings of a computation that are known before anything runs; precision may be auto."""
    known = {**asdict(policy), "pooling": ",".join(outputs.poolings), "per_residue": outputs.per_residue}
    if model.family.is_protein:
        known["tokenizer"] = model.family.name
    if model.architecture:
        known["layers"] = ",".join(map(str, outputs.of(model.architecture.num_layers).layers))
    if precision != "auto":
        known["precision"] = precision
    return known


def require_settings(source: Source, model: ModelSource, known: Mapping[str, Any], dtype: str) -> None:
    """Raise a SeqmillError if the settings are incompatible with an earlier result; see `known_settings`."""
    is_other = source.family != model.family
    if is_other or (model.architecture and model.architecture.hidden_dim != source.outputs[0].shape[1]):
        raise SeqmillError(
            f"{source.path}: can't be reused: its model is {source.attributes['model']}, not {model.name}; {TAKE_OUT}"
        )
    require_same(source.path, source.attributes, known)
    require_dtype(source, dtype)


def reused_by(results: Path, known: Mapping[str, Any]) -> dict[Path, str]:
    """Return the files that a dataset's vectors were reused from, in their order, with their fingerprints.

    The index names them, or the manifest once the index is deleted. They count only if the results were made with
    the settings `known` now (see `known_settings`).
    """
    folder = RunFolder(results)
    source = folder.index if folder.index.exists() else folder.embeddings
    try:
        with open_hdf5(source, source.name) as file:
            attributes = read_attributes(file)
        if source == folder.index:
            notes = json.loads(attributes["reuse"])
        else:
            notes = json.loads(folder.manifest.read_text(encoding="utf-8"))["reuse"]
        for note in notes:
            require_same(note["path"], {**attributes, **note}, known)
        return {Path(note["path"]): note["fingerprint"] for note in notes}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SeqmillError):
        return {}  # a damaged file is reported by its reader


def require_ready(index: Path, paths: Iterable[Path], dtype: str, is_built: bool) -> None:
    """Raise a SeqmillError if the merge of a dataset would refuse a file that it takes vectors from.

    The vectors are not checked. If the index `is_built` already, the files must be the ones it names.
    """
    notes: list[dict[str, Any]] = []
    if is_built:
        with open_hdf5(index, "index") as file:
            notes = json.loads(read_attributes(file).get("reuse", "[]"))
    try:
        for path in paths:
            require_dtype(open_source(path), dtype)
        for note in notes:
            open_noted(note)
    except SeqmillError as error:
        raise SeqmillError(f"{error}; {bring_back(index)}") from None
