"""Fingerprints: everything that embeddings depend on. Results with different fingerprints are never combined."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from seqmill.errors import SeqmillError

SHARD_FORMAT = 4


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a computation."""

    index_digest: str  # covers the sequences, their order, the letter and length policies and the pack plan
    model: str  # the model's name, as given
    model_digest: str  # covers the weights' values
    layers: str  # numbers from 0 on, separated by commas, in the order of the outputs
    pooling: str  # the poolings of each layer, separated by commas
    precision: str  # of the matrix products
    per_residue: str = ""  # dtype of the stored residue vectors; empty if they are not stored
    shard_format: int = SHARD_FORMAT  # version of the files

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of all fields except `model`, which is only a name for the weights."""
        fields = {key: value for key, value in asdict(self).items() if key != "model"}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def attributes(self) -> dict[str, Any]:
        """Return the fields and the digest, for file attributes or JSON."""
        return {**asdict(self), "fingerprint": self.digest}

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any]) -> "Fingerprint":
        """Read the fields back; raise a SeqmillError if one is missing or the digest does not match."""
        if not isinstance(attributes, dict):  # from a damaged JSON
            raise SeqmillError("the fingerprint is not a set of fields")
        try:
            found = cls(**{name: attributes[name] for name in cls.__dataclass_fields__})
        except KeyError as error:
            raise SeqmillError(f"the fingerprint lacks {error}") from None
        if attributes.get("fingerprint") != found.digest:
            raise SeqmillError("the fingerprint does not match its fields")
        return found

    def difference(self, other: "Fingerprint") -> str:
        """Return a description of the fields that differ; empty if the computations are the same."""
        mine, others = asdict(self), asdict(other)
        fields = [name for name in mine if mine[name] != others[name] and name != "model"]
        return ", ".join(f"{name} is {mine[name]}, not {others[name]}" for name in fields)
