"""Sequences, a model, and the embeddings that a worker would compute of them, for tests of the audit."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from families import write_fasta
from seqmill.embedding.audit import StoredVectors, audit_embeddings
from seqmill.embedding.pooling import poolings_of
from seqmill.index.build import build_index
from seqmill.model.encoder import Encoder
from seqmill.model.families import IMPLEMENTATIONS
from seqmill.model.pack import Pack
from seqmill.model.weights import load_weights
from seqmill.spec.architectures import Architecture
from seqmill.spec.families import Family
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import ModelSource, find_model
from seqmill.spec.outputs import Outputs
from seqmill.store.index import Index, open_index
from seqmill.store.status import AuditFacts

AMPLE = 600.0  # seconds: more than a slow machine needs
WHOLE = LengthPolicy("full", 0)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Sequences, and the weights of a model."""

    index: Index
    source: ModelSource
    architecture: Architecture
    tensors: Tensors

    @property
    def family(self) -> Family:
        return self.source.family

    def model(self, dtype: torch.dtype = torch.float32, tensors: Tensors | None = None) -> Encoder:
        make = IMPLEMENTATIONS[self.family].encoder
        return make(self.architecture, tensors or self.tensors, dtype, self.index.max_tokens, "sdpa")

    def packs(self) -> list[Pack]:
        index = self.index
        return [Pack.from_tokens(index.pack_tokens(n), index.pack_lengths(n)) for n in range(index.num_packs)]

    def embeddings(self, hidden: list[torch.Tensor], pooling: str = "mean") -> np.ndarray:
        """Return the embeddings of all sequences from the hidden states of the packs, as a worker computes them."""
        found = []
        for number, (pack, states) in enumerate(zip(self.packs(), hidden, strict=True)):
            how = poolings_of(self.family)[pooling]
            vectors, segments = how.of_segment(states, pack).numpy(), self.index.pack_segments(number)
            if segments is None and how.width > 1:
                segments = np.arange(len(vectors)), np.ones(len(vectors), np.int32)
            found.append(vectors if segments is None else how.combine(vectors, *segments))
        return np.concatenate(found)

    def compute(self, model: Encoder, pooling: str = "mean") -> np.ndarray:
        return self.embeddings([model(pack) for pack in self.packs()], pooling)

    def audit(self, embeddings: np.ndarray, pooling: str = "mean") -> AuditFacts:
        outputs = Outputs((self.architecture.num_layers,), (pooling,))
        stored = StoredVectors(self.index, outputs, embeddings.__getitem__)
        audit = audit_embeddings(stored, self.source, np.arange(self.index.num_sequences), AMPLE)
        print(audit)
        return audit


def make_case(folder: Path, model: str, sequences: list[str], policy: LengthPolicy = WHOLE) -> Case:
    """Build an index in a new folder, and load the model."""
    folder.mkdir()
    fasta = write_fasta(folder / "some.fa", sequences)
    build_index(fasta, folder / "index.h5", model, policy)
    source = find_model(model)
    weights = load_weights(source)
    return Case(open_index(folder / "index.h5"), source, weights.architecture, weights.tensors)
