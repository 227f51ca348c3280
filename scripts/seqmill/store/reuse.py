"""Vectors of identical sequences, taken from earlier results: adding to a FASTA costs what was added. No torch.

`build_index` finds the sequences that have a vector and notes the files in the index. The worker and the merge compare
the notes with their own computation, and the merge reads the vectors (`seqmill.merge.reused`).
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seqmill.base.digests import sha256_but_for
from seqmill.base.hdf5 import map_dataset, open_hdf5
from seqmill.errors import SeqmillError
from seqmill.spec.families import Family, family_of_tokenizer
from seqmill.spec.fingerprint import Fingerprint
from seqmill.spec.lengths import LengthPolicy
from seqmill.store.embeddings import EmbeddingsFile
from seqmill.store.index import Index
from seqmill.store.layout import RunFolder

# Besides the policies, these must be equal for a vector to be one of the same computation.
COMPUTATION = ("model_digest", "layers", "pooling", "precision", "per_residue")
BLOCK_ROWS = 1 << 20
BLOCK_BYTES = 16 << 20
TAKE_OUT = "take it out of reuse"
FREE_CHOICES = ("long_sequences", "max_length", "window", "stride", "strand", "layers", "pooling", "precision")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """An embeddings file to take vectors from. Arrays are memory maps."""

    path: Path  # absolute
    attributes: dict[str, Any]  # those of the file
    fingerprint: Fingerprint
    digests: np.ndarray  # uint8 (rows, 16), of each row's cleaned sequence
    outputs: list[np.ndarray]  # of each output, (rows, hidden_dim), float32 or float16

    @property
    def family(self) -> Family:
        """The family of models that reads the sequences."""
        return family_of_tokenizer(str(self.attributes.get("tokenizer")))

    @property
    def note(self) -> dict[str, Any]:
        """What the index notes about the file."""
        sizes = {"bytes": self.path.stat().st_size, "rows": len(self.digests)}
        return {"path": str(self.path), **sizes, **self.fingerprint.attributes()}

    def require_digests(self, index: Index, places: np.ndarray) -> None:
        """Raise a SeqmillError if a row is of another sequence than these of the index's reused sequences."""
        for start in range(0, len(places), BLOCK_ROWS):
            block = places[start : start + BLOCK_ROWS]
            wanted = index.sequence_digests[index.num_computed + block]
            rows = index.reused_rows[block]
            if rows.max() >= len(self.digests) or (self.digests[rows] != wanted).any():
                raise SeqmillError(f"{self.path}: its sequences are not those that it had when the index was built")

    def require_values(self) -> None:
        """Raise a SeqmillError if a vector is not finite, or the bytes differ from the digests in manifest.json.

        If there is no manifest of the same result, a warning says that the values can't be checked.
        """
        digest, *_ = [self._digest_of_finite(values) for values in self.outputs]
        path = RunFolder(self.path.parent).manifest
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            (noted,) = (output for output in manifest["outputs"].values() if "embeddings_sha256" in output)
            digests = noted["embeddings_sha256"], noted["rest_sha256"]
            offset, size = int(noted["data_offset"]), int(noted["data_bytes"])
            fingerprint = manifest["fingerprint"]["fingerprint"]
        except FileNotFoundError:
            log.warning("%s: no manifest.json in its folder: its values can't be checked", self.path)
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.warning("%s: can't be read, so the values of %s can't be checked: %s", path, self.path, error)
            return
        if fingerprint != self.fingerprint.digest:
            log.warning("%s: of another result: the values of %s can't be checked", path, self.path)
            return
        first = self.outputs[0]
        same_place = (offset, size) == (first.offset, first.nbytes)  # type: ignore[attr-defined]  # a map: it has rows
        if not same_place or digests != (digest, sha256_but_for(self.path, offset, size)):
            raise SeqmillError(f"{self.path}: is damaged: its bytes differ from the digests in {path}")

    def _digest_of_finite(self, values: np.ndarray) -> str:
        """Return the SHA-256 of an output's values, read once in blocks; raise a SeqmillError if one is not finite."""
        digest = hashlib.sha256()
        block_rows = max(BLOCK_BYTES // (values.itemsize * values.shape[1]), 1)
        for start in range(0, len(values), block_rows):
            block = values[start : start + block_rows]
            digest.update(block)
            finite = np.isfinite(block).all(axis=1)
            if not finite.all():
                raise SeqmillError(f"{self.path}: the vector in its row {start + int(np.argmin(finite))} is not finite")
        return digest.hexdigest()


def open_source(path: Path) -> Source:
    """Open an embeddings file to take vectors from; raise a SeqmillError if it is missing or damaged."""
    path = path.absolute()
    first = EmbeddingsFile(path)
    try:
        fingerprint = Fingerprint.from_attributes(first.attrs)
    except SeqmillError as error:
        raise SeqmillError(f"{path}: {error}; merge its shards again") from None
    with open_hdf5(path, "embeddings file") as file:
        digests = map_dataset(path, file["sequence_digests"])
    if digests.dtype != np.uint8 or digests.shape != (len(first), 16):
        raise SeqmillError(f"{path}: sequence_digests have another type or shape; merge its shards again")
    outputs = [EmbeddingsFile(path, *output).array for output in first.outputs]
    return Source(path, first.attrs, fingerprint, digests, outputs)


def require_policies(paths: Sequence[Path], tokenizer: str, letter_policy: str, policy: LengthPolicy) -> list[Source]:
    """Open embeddings files; raise a SeqmillError if one has sequences cleaned, cut or tokenized by other policies."""
    sources = [open_source(path) for path in paths]
    for source in sources:
        wanted = {"tokenizer": tokenizer, "letter_policy": letter_policy, **asdict(policy)}
        require_same(source.path, source.attributes, wanted)
    return sources


def take_out_of(index: Path) -> str:
    """Return the advice of an error: how to compute everything that an index reuses."""
    return f"{TAKE_OUT} and remove {index} and the manifest.json in its folder"


def bring_back(index: Path) -> str:
    """Return the advice of an error: what to do if a file that an index reuses has changed."""
    return f"{index.parent} takes vectors from it: bring it back as it was, or {take_out_of(index)}"


def require_computation(index: Index, fingerprint: Fingerprint) -> None:
    """Raise a SeqmillError if a file that the index reuses is of another computation than this one."""
    wanted = {name: getattr(fingerprint, name) for name in COMPUTATION}
    for note in index.reuse:
        require_same(note["path"], note, wanted, take_out_of(index.path))


def require_dtype(source: Source, dtype: str) -> None:
    """Raise a SeqmillError if the file's vectors have a lower precision than the result's dtype."""
    stored = source.outputs[0].dtype
    if stored != dtype and stored != np.float32:
        raise SeqmillError(
            f"{source.path}: can't be reused: its vectors are rounded to {stored}, and dtype is {dtype}; "
            f"{TAKE_OUT}, or set dtype: {stored}"
        )


def require_same(path: Path | str, found: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str = TAKE_OUT) -> None:
    """Raise a SeqmillError if a setting of an earlier result, `found`, differs from the one that is wanted."""
    for name, value in wanted.items():
        if name == "per_residue":  # an earlier result may have residue vectors; they are only never reused
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


def open_noted(note: Mapping[str, Any]) -> Source:
    """Open a file that an index names; raise a SeqmillError if it is not as it was when the index was built."""
    source = open_source(Path(note["path"]))
    found = source.note
    for name in ("fingerprint", "rows", "bytes"):
        if found[name] != note[name]:
            raise SeqmillError(
                f"{source.path}: has {name} {found[name]}, and had {note[name]} when the index was built"
            )
    return source


def require_values(sources: list[Source], reused_files: np.ndarray) -> None:
    """Read the files that vectors will be taken from; raise a SeqmillError if one is damaged or a vector not finite.

    `reused_files` (int32) has the number of each sequence's file, -1 if none (`seqmill.index.order.find_reused`).
    """
    for number in np.unique(reused_files[reused_files >= 0]):
        try:
            sources[number].require_values()
        except SeqmillError as error:
            raise SeqmillError(f"{error}; {TAKE_OUT}, or compute that result again") from None
