"""Each family's reference: how it is made, and what a segment costs it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from seqmill.embedding.references import dnabert_s, esm2, esmc, t5
from seqmill.embedding.references.reference import Reference, Tensors
from seqmill.spec.architectures import Architecture
from seqmill.spec.families import DNABERT_S, ESM2, ESMC, PROSTT5, PROTT5, Family


@dataclass(frozen=True)
class Recipe:
    """A family's reference."""

    make: Callable[[Any, Tensors, int], Reference]
    memory: Callable[[Any, int], int]
    score_operations: int  # cost of the passes over the scores per head and pair of tokens


_T5 = Recipe(t5.make, t5.memory, t5.SCORE_OPERATIONS)
RECIPES: dict[Family, Recipe] = {
    ESM2: Recipe(esm2.make, esm2.memory, esm2.SCORE_OPERATIONS),
    DNABERT_S: Recipe(dnabert_s.make, dnabert_s.memory, dnabert_s.SCORE_OPERATIONS),
    ESMC: Recipe(esmc.make, esmc.memory, esmc.SCORE_OPERATIONS),
    PROTT5: _T5,
    PROSTT5: _T5,
}


def make_reference(architecture: Architecture, tensors: Tensors, max_tokens: int) -> Reference:
    """Return the reference of a model's family, for segments of up to `max_tokens` tokens."""
    return RECIPES[architecture.family].make(architecture, tensors, max_tokens)


def operations(architecture: Architecture, num_tokens: int) -> float:
    """Return a segment's operations in a layer: matrix products, and passes over the attention scores."""
    a_score = RECIPES[architecture.family].score_operations
    products = 2 * architecture.matrix_parameters / architecture.num_layers
    return products * num_tokens + (4 * architecture.inner_dim + a_score * architecture.num_heads) * num_tokens**2


def memory(architecture: Architecture, num_tokens: int) -> int:
    """Return the bytes that a segment needs in addition to the weights."""
    return RECIPES[architecture.family].memory(architecture, num_tokens)
