"""Vectors of identical sequences, taken from earlier results: adding to a FASTA costs what was added. No torch.

`build_index` finds which sequences have one and notes the files in the index, the worker and the merge hold the
notes against what they compute, and the merge takes the vectors (`seqpack.reused_vectors`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seqpack.embeddings import open_embeddings
from seqpack.errors import SeqpackError
from seqpack.fingerprint import Fingerprint
from seqpack.hdf5 import map_dataset, open_hdf5, read_attributes
from seqpack.index import Index
from seqpack.length_policy import LengthPolicy
from seqpack.models.registry import DNABERT_S, ESM2, ModelSource
from seqpack.outputs import Outputs

# What must be the same for a vector to be that of the same computation, besides the policies.
COMPUTATION = ("model_digest", "layers", "pooling", "precision", "per_residue")
BLOCK_ROWS = 1 << 20
TAKE_OUT = "take it out of reuse"
FREE_CHOICES = ("long_sequences", "max_length", "window", "stride", "strand", "layers", "pooling", "precision")


@dataclass(frozen=True)
class Source:
    """An embeddings file to take vectors from.

    Attributes:
        path: absolute.
        attributes: those of the file.
        fingerprint: of the computation.
        digests: uint8 (rows, 16), of each row's cleaned sequence; a memory map.
        outputs: of each output (rows, hidden_dim), float32 or float16; memory maps.
    """

    path: Path
    attributes: dict[str, Any]
    fingerprint: Fingerprint
    digests: np.ndarray
    outputs: list[np.ndarray]

    @property
    def family(self) -> str:
        """The family of models that reads the sequences."""
        return DNABERT_S if str(self.attributes.get("tokenizer")).startswith("bpe") else ESM2


def open_source(path: Path) -> Source:
    """Open an embeddings file to take vectors from.

    Raises:
        SeqpackError: absent, truncated, damaged, or not an embeddings file of this version's format.
    """
    path = path.absolute()
    first = open_embeddings(path)
    try:
        fingerprint = Fingerprint.from_attributes(first.attrs)
    except SeqpackError as error:
        raise SeqpackError(f"{path}: {error}; merge its shards again") from None
    with open_hdf5(path, "embeddings file") as file:
        digests = map_dataset(path, file["sequence_digests"])
    if digests.dtype != np.uint8 or digests.shape != (len(first), 16):
        raise SeqpackError(f"{path}: sequence_digests have another type or shape; merge its shards again")
    outputs = [open_embeddings(path, *output).array for output in first.outputs]
    return Source(path, first.attrs, fingerprint, digests, outputs)


def require_policies(paths: Sequence[Path], tokenizer: str, letter_policy: str, policy: LengthPolicy) -> list[Source]:
    """Open embeddings files, once their sequences are known to have been cleaned, cut and tokenized as here.

    Raises:
        SeqpackError: names the file, and the setting with both values.
    """
    sources = [open_source(path) for path in paths]
    for source in sources:
        wanted = {"tokenizer": tokenizer, "letter_policy": letter_policy, **asdict(policy)}
        _require_same(source.path, source.attributes, wanted)
    return sources


def known_settings(model: ModelSource, policy: LengthPolicy, outputs: Outputs, precision: str) -> dict[str, Any]:
    """Return what is known of a computation before anything runs; precision may be auto, as set."""
    known = {**asdict(policy), "pooling": ",".join(outputs.poolings), "per_residue": outputs.per_residue}
    if model.architecture:
        known["layers"] = ",".join(map(str, outputs.of(model.architecture.num_layers).layers))
    if precision != "auto":
        known["precision"] = precision
    return known


def require_settings(source: Source, model: ModelSource, known: Mapping[str, Any], dtype: str) -> None:
    """Raise a SeqpackError if what is known before anything runs speaks against taking vectors from a file."""
    if model.architecture and model.architecture.hidden_dim != source.outputs[0].shape[1]:
        raise SeqpackError(
            f"{source.path}: can't be reused: it is of {source.attributes['model']}, not of {model.name}; {TAKE_OUT}"
        )
    _require_same(source.path, source.attributes, known)
    require_dtype(source, dtype)


def take_out_of(index: Path) -> str:
    """Return how to have everything computed anew that an index reuses, as words of an error."""
    return f"{TAKE_OUT} and remove {index} and the manifest.json beside it"


def bring_back(index: Path) -> str:
    """Return what to do where a file that an index reuses is not as it was, as words of an error."""
    return f"{index.parent} takes vectors from it: bring it back as it was, or {take_out_of(index)}"


def require_computation(index: Index, fingerprint: Fingerprint) -> None:
    """Raise a SeqpackError if a file that the index reuses is of another computation than this one."""
    wanted = {name: getattr(fingerprint, name) for name in COMPUTATION}
    for note in index.reuse:
        _require_same(note["path"], note, wanted, take_out_of(index.path))


def require_dtype(source: Source, dtype: str) -> None:
    """Raise a SeqpackError if the file's vectors are rounded to less than the result's dtype."""
    stored = source.outputs[0].dtype
    if stored != dtype and stored != np.float32:
        raise SeqpackError(
            f"{source.path}: can't be reused: its vectors are rounded to {stored}, and dtype is {dtype}; "
            f"{TAKE_OUT}, or set dtype: {stored}"
        )


def _require_same(
    path: Path | str, found: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str = TAKE_OUT
) -> None:
    for name, value in wanted.items():
        if name == "per_residue":  # that an earlier result has them does no harm
            if value:
                raise SeqpackError(
                    f"{path}: can't be reused: vectors of residues are not taken from earlier results; {remedy}, or "
                    "set per_residue: false"
                )
        elif found.get(name) != value:
            instead = f", or set {name}: {found.get(name)}" if name in FREE_CHOICES else ""
            raise SeqpackError(
                f"{path}: can't be reused: it has {name}={found.get(name)}, this computation {name}={value}; "
                f"{remedy}{instead}"
            )


def find_reused(digests: np.ndarray, sources: list[Source]) -> tuple[np.ndarray, np.ndarray]:
    """Find the sequences that files have; the first file that has one counts, in it the first row.

    Args:
        digests: uint8 (num_sequences, 16), each once.
        sources: the files.

    Returns:
        files: int32 (num_sequences,), which file has the sequence; -1 if none.
        rows: int64 (num_sequences,), and in which row.
    """
    files, rows = np.full(len(digests), -1, np.int32), np.full(len(digests), -1, np.int64)
    if not sources:
        return files, rows
    wanted = _keys(digests)
    by_digest = np.argsort(wanted, kind="stable")
    wanted = wanted[by_digest]
    for number, source in enumerate(sources):
        for start in range(0, len(source.digests), BLOCK_ROWS):
            keys = _keys(source.digests[start : start + BLOCK_ROWS])
            order = np.argsort(keys, kind="stable")  # a search for sorted keys is many times as fast
            keys = keys[order]
            places = np.searchsorted(wanted, keys)
            places[places == len(wanted)] = 0
            found = np.flatnonzero(wanted[places] == keys)
            sequences = by_digest[places[found]]
            is_new = files[sequences] < 0
            sequences, new_rows = sequences[is_new], start + order[found[is_new]]
            files[sequences] = number
            rows[sequences[::-1]] = new_rows[::-1]  # of equal digests the first is written last
    return files, rows


def _keys(digests: np.ndarray) -> np.ndarray:
    """Return digests as values that NumPy can sort."""
    return np.ascontiguousarray(digests).view("S16").ravel()


def note_sources(sources: list[Source]) -> str:
    """Return what the index's attribute `reuse` says of the files, as JSON."""
    notes = [
        {
            "path": str(source.path),
            "bytes": source.path.stat().st_size,
            "rows": len(source.digests),
            **source.fingerprint.attributes(),
        }
        for source in sources
    ]
    return json.dumps(notes)


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
            _require_same(note["path"], {**attributes, **note}, known)
        return {Path(note["path"]): note["fingerprint"] for note in notes}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SeqpackError):
        return {}  # if one is damaged, its reader will say so


def open_noted(note: Mapping[str, Any]) -> Source:
    """Open a file that an index names, once it is known to be the same as when the index was built.

    Raises:
        SeqpackError: it is gone, damaged, or another.
    """
    path = Path(note["path"])
    source = open_source(path)
    found = {"fingerprint": source.fingerprint.digest, "rows": len(source.digests), "bytes": path.stat().st_size}
    for name, value in found.items():
        if value != note[name]:
            raise SeqpackError(f"{path}: has {name} {value}, and had {note[name]} when the index was built")
    return source


def require_ready(index: Path, paths: Iterable[Path], dtype: str, is_built: bool) -> None:
    """Raise a SeqpackError if the merge of a dataset would refuse a file that it takes vectors from.

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
    except SeqpackError as error:
        raise SeqpackError(f"{error}; {bring_back(index)}") from None
