"""What an embedding depends on. Results whose fingerprints differ are never combined."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from seqmill.errors import SeqmillError

SHARD_FORMAT = 4


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a computation.

    Attributes:
        index_digest: the sequences, their order, the letter and length policies and the pack plan.
        model: the model's name, as given.
        model_digest: the weights' values.
        layers: those that are read, from 0 on, separated by commas, in the order of the outputs.
        pooling: those of each layer, from tokens to a sequence, separated by commas.
        precision: of the matrix products.
        per_residue: the dtype in which the vectors of residues are kept; empty if they are not.
        shard_format: of the files.
    """

    index_digest: str
    model: str
    model_digest: str
    layers: str
    pooling: str
    precision: str
    per_residue: str = ""
    shard_format: int = SHARD_FORMAT

    @property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of all fields but `model`, which is only a name of the weights."""
        fields = {key: value for key, value in asdict(self).items() if key != "model"}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def attributes(self) -> dict[str, Any]:
        """Return the fields and the digest, as file attributes or JSON."""
        return {**asdict(self), "fingerprint": self.digest}

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any]) -> Fingerprint:
        """Read the fields back.

        Raises:
            SeqmillError: a field is absent, or the digest is not theirs.
        """
        if not isinstance(attributes, dict):  # as a damaged JSON may have it
            raise SeqmillError("the fingerprint is not a set of fields")
        try:
            found = cls(**{name: attributes[name] for name in cls.__dataclass_fields__})
        except KeyError as error:
            raise SeqmillError(f"the fingerprint lacks {error}") from None
        if attributes.get("fingerprint") != found.digest:
            raise SeqmillError("the fingerprint does not match its fields")
        return found

    def difference(self, other: Fingerprint) -> str:
        """Return in words where two fingerprints differ; empty if they are the same computation."""
        mine, others = asdict(self), asdict(other)
        fields = [name for name in mine if mine[name] != others[name] and name != "model"]
        return ", ".join(f"{name} is {mine[name]}, not {others[name]}" for name in fields)
