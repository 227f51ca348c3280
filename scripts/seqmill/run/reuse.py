"""Vectors of identical sequences, taken from earlier results: adding to a FASTA costs what was added. No torch.

`build_index` finds which sequences have one and notes the files in the index, the worker and the merge hold the
notes against what they compute, and the merge takes the vectors (`seqmill.merge.reused`).
"""

from __future__ import annotations

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
from seqmill.store.reuse import TAKE_OUT, Source, bring_back, open_noted, open_source, require_dtype, require_same


def known_settings(model: ModelSource, policy: LengthPolicy, outputs: Outputs, precision: str) -> dict[str, Any]:
    """Return what is known of a computation before anything runs; precision may be auto, as set."""
    known = {**asdict(policy), "pooling": ",".join(outputs.poolings), "per_residue": outputs.per_residue}
    if model.architecture:
        known["layers"] = ",".join(map(str, outputs.of(model.architecture.num_layers).layers))
    if precision != "auto":
        known["precision"] = precision
    return known


def require_settings(source: Source, model: ModelSource, known: Mapping[str, Any], dtype: str) -> None:
    """Raise a SeqmillError if what is known before anything runs speaks against taking vectors from a file."""
    if model.architecture and model.architecture.hidden_dim != source.outputs[0].shape[1]:
        raise SeqmillError(
            f"{source.path}: can't be reused: it is of {source.attributes['model']}, not of {model.name}; {TAKE_OUT}"
        )
    require_same(source.path, source.attributes, known)
    require_dtype(source, dtype)


def reused_by(results: Path, known: Mapping[str, Any]) -> dict[Path, str]:
    """Return the files that a dataset's vectors are reused from, and their fingerprints, in their order.

    By its index; once that is deleted, by the merged result.

    Args:
        results: the dataset's folder.
        known: if its settings are others than these (`known_settings`), the files no longer count: there are none.
    """
    index, merged = results / "index.h5", results / "embeddings.h5"
    teller = index if index.exists() else merged
    try:
        with open_hdf5(teller, teller.name) as file:
            attributes = read_attributes(file)
        if teller == index:
            notes = json.loads(attributes["reuse"])
        else:
            notes = json.loads((results / "manifest.json").read_text(encoding="utf-8"))["reuse"]
        for note in notes:
            require_same(note["path"], {**attributes, **note}, known)
        return {Path(note["path"]): note["fingerprint"] for note in notes}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SeqmillError):
        return {}  # if one is damaged, its reader will say so


def require_ready(index: Path, paths: Iterable[Path], dtype: str, is_built: bool) -> None:
    """Raise a SeqmillError if the merge of a dataset would refuse a file that it takes vectors from.

    Of its values nothing is read.

    Args:
        index: of the dataset.
        paths: the files.
        dtype: of the result.
        is_built: whether the index stays as it is, so that the files must be those that it names.
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
