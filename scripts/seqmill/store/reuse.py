"""Vectors of identical sequences, taken from earlier results: adding to a FASTA costs what was added. No torch.

`build_index` finds which sequences have one and notes the files in the index, the worker and the merge hold the
notes against what they compute, and the merge takes the vectors (`seqmill.merge.reused`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seqmill.base.hdf5 import map_dataset, open_hdf5, sha256_but_for
from seqmill.errors import SeqmillError
from seqmill.spec.fingerprint import Fingerprint
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import DNABERT_S, ESM2
from seqmill.store.embeddings import open_embeddings
from seqmill.store.index import Index

# What must be the same for a vector to be that of the same computation, besides the policies.
COMPUTATION = ("model_digest", "layers", "pooling", "precision", "per_residue")
BLOCK_ROWS = 1 << 20
BLOCK_BYTES = 16 << 20
TAKE_OUT = "take it out of reuse"
FREE_CHOICES = ("long_sequences", "max_length", "window", "stride", "strand", "layers", "pooling", "precision")

log = logging.getLogger(__name__)


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
        SeqmillError: absent, truncated, damaged, or not an embeddings file of this version's format.
    """
    path = path.absolute()
    first = open_embeddings(path)
    try:
        fingerprint = Fingerprint.from_attributes(first.attrs)
    except SeqmillError as error:
        raise SeqmillError(f"{path}: {error}; merge its shards again") from None
    with open_hdf5(path, "embeddings file") as file:
        digests = map_dataset(path, file["sequence_digests"])
    if digests.dtype != np.uint8 or digests.shape != (len(first), 16):
        raise SeqmillError(f"{path}: sequence_digests have another type or shape; merge its shards again")
    outputs = [open_embeddings(path, *output).array for output in first.outputs]
    return Source(path, first.attrs, fingerprint, digests, outputs)


def require_policies(paths: Sequence[Path], tokenizer: str, letter_policy: str, policy: LengthPolicy) -> list[Source]:
    """Open embeddings files, once their sequences are known to have been cleaned, cut and tokenized as here.

    Raises:
        SeqmillError: names the file, and the setting with both values.
    """
    sources = [open_source(path) for path in paths]
    for source in sources:
        wanted = {"tokenizer": tokenizer, "letter_policy": letter_policy, **asdict(policy)}
        _require_same(source.path, source.attributes, wanted)
    return sources


def take_out_of(index: Path) -> str:
    """Return how to have everything computed anew that an index reuses, as words of an error."""
    return f"{TAKE_OUT} and remove {index} and the manifest.json beside it"


def bring_back(index: Path) -> str:
    """Return what to do where a file that an index reuses is not as it was, as words of an error."""
    return f"{index.parent} takes vectors from it: bring it back as it was, or {take_out_of(index)}"


def require_computation(index: Index, fingerprint: Fingerprint) -> None:
    """Raise a SeqmillError if a file that the index reuses is of another computation than this one."""
    wanted = {name: getattr(fingerprint, name) for name in COMPUTATION}
    for note in index.reuse:
        _require_same(note["path"], note, wanted, take_out_of(index.path))


def require_dtype(source: Source, dtype: str) -> None:
    """Raise a SeqmillError if the file's vectors are rounded to less than the result's dtype."""
    stored = source.outputs[0].dtype
    if stored != dtype and stored != np.float32:
        raise SeqmillError(
            f"{source.path}: can't be reused: its vectors are rounded to {stored}, and dtype is {dtype}; "
            f"{TAKE_OUT}, or set dtype: {stored}"
        )


def _require_same(
    path: Path | str, found: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str = TAKE_OUT
) -> None:
    for name, value in wanted.items():
        if name == "per_residue":  # that an earlier result has them does no harm
            if value:
                raise SeqmillError(
                    f"{path}: can't be reused: vectors of residues are not taken from earlier results; {remedy}, or "
                    "set per_residue: false"
                )
        elif found.get(name) != value:
            instead = f", or set {name}: {found.get(name)}" if name in FREE_CHOICES else ""
            raise SeqmillError(
                f"{path}: can't be reused: it has {name}={found.get(name)}, this computation {name}={value}; "
                f"{remedy}{instead}"
            )


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


def open_noted(note: Mapping[str, Any]) -> Source:
    """Open a file that an index names, once it is known to be the same as when the index was built.

    Raises:
        SeqmillError: it is gone, damaged, or another.
    """
    path = Path(note["path"])
    source = open_source(path)
    found = {"fingerprint": source.fingerprint.digest, "rows": len(source.digests), "bytes": path.stat().st_size}
    for name, value in found.items():
        if value != note[name]:
            raise SeqmillError(f"{path}: has {name} {value}, and had {note[name]} when the index was built")
    return source


def require_values(sources: list[Source], reused_files: np.ndarray) -> None:
    """Read the files that vectors are to be taken from: before, not only after, the rest is computed.

    Args:
        sources: the files.
        reused_files: int32, which of them has a sequence; -1 if none (`seqmill.index.order.find_reused`).

    Raises:
        SeqmillError: a vector is not finite, or a file is damaged.
    """
    for number in np.unique(reused_files[reused_files >= 0]):
        try:
            _require_values(sources[number])
        except SeqmillError as error:
            raise SeqmillError(f"{error}; {TAKE_OUT}, or compute that result anew") from None


def _require_digests(index: Index, source: Source, places: np.ndarray) -> None:
    """Raise a SeqmillError if a row of the file is not of the sequence that it is taken for."""
    for start in range(0, len(places), BLOCK_ROWS):
        block = places[start : start + BLOCK_ROWS]
        wanted = index.sequence_digests[index.num_computed + block]
        rows = index.reused_rows[block]
        if rows.max() >= len(source.digests) or (source.digests[rows] != wanted).any():
            raise SeqmillError(f"{source.path}: its sequences are not those that it had when the index was built")


def _require_values(source: Source) -> None:
    """Raise a SeqmillError if a vector is not finite, or the bytes are not those that the manifest beside tells of.

    A warning says that they can't be checked where there is no manifest of the same result.
    """
    digest, *_ = [_digest_of_finite(source, values) for values in source.outputs]
    path = source.path.with_name("manifest.json")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        (said,) = (output for output in manifest["outputs"].values() if "embeddings_sha256" in output)
        digests = said["embeddings_sha256"], said["rest_sha256"]
        offset, size = int(said["data_offset"]), int(said["data_bytes"])
        fingerprint = manifest["fingerprint"]["fingerprint"]
    except FileNotFoundError:
        log.warning("%s: no manifest.json beside it: its values can't be checked", source.path)
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s: can't be read, so that the values of %s can't be checked: %s", path, source.path, error)
        return
    if fingerprint != source.fingerprint.digest:
        log.warning("%s: of another result: the values of %s can't be checked", path, source.path)
        return
    first = source.outputs[0]
    if (offset, size) != (first.offset, first.nbytes) or digests != (  # type: ignore[attr-defined]
        digest,
        sha256_but_for(source.path, offset, size),
    ):
        raise SeqmillError(f"{source.path}: is damaged: its bytes are not those that {path} tells of")


def _digest_of_finite(source: Source, values: np.ndarray) -> str:
    """Return the SHA-256 of an output's bytes, read once in blocks; raise a SeqmillError if one is not finite."""
    digest = hashlib.sha256()
    block_rows = max(BLOCK_BYTES // (values.itemsize * values.shape[1]), 1)
    for start in range(0, len(values), block_rows):
        block = values[start : start + block_rows]
        digest.update(block)  # type: ignore[arg-type]
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise SeqmillError(f"{source.path}: the vector in its row {row} is not finite")
    return digest.hexdigest()
