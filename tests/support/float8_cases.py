"""Rows and models for tests of float8, on a CPU and on a GPU."""

import numpy as np
import torch

from families import SMALL_ESM2
from reference import one_pack
from seqmill.embedding.pooling import mean_over_residues, mean_over_tokens
from seqmill.model.dnabert_s import DnabertS
from seqmill.model.elementwise import EAGER
from seqmill.model.esm2 import ESM2
from seqmill.model.float8 import Scaled
from seqmill.model.pack import Pack
from seqmill.spec.architectures import Architecture
from sequences import random_sequences

LENGTHS = [130, 64, 33, 30, 7, 1]
NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def odd_rows(width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return nine rows of very different sizes, one of zeros, and the last three with a value that is not finite."""
    x = (normal(9, width) * torch.tensor([1, 1e-3, 1e30, 1e-37, 0, 7, 1, 1, 1])[:, None]).to(dtype)
    for row, value in zip((6, 7, 8), NOT_FINITE, strict=True):
        x[row, width // 3] = value
    return x


def exact(rows: Scaled) -> torch.Tensor:
    """Return the rows that the rounded values and their scales stand for, in float64."""
    return rows.values.double() * rows.scales.double()


def pack_of(architecture: Architecture, lengths: list[int]) -> Pack:
    """Return sequences of so many residues, or of so many tokens between CLS and SEP."""
    if architecture is SMALL_ESM2:
        return one_pack(random_sequences(lengths))
    tokens = np.random.default_rng(3).integers(5, architecture.vocabulary, sum(lengths) + 2 * len(lengths))
    return Pack.from_tokens(tokens.astype(np.uint16), np.array(lengths) + 2)


def means(
    architecture: Architecture,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype,
    lengths: list[int] = LENGTHS,
    elementwise: str = EAGER,
) -> torch.Tensor:
    """Return the mean embeddings of the sequences of `pack_of`, computed on the CPU."""
    pack = pack_of(architecture, lengths)
    family, pool = (ESM2, mean_over_residues) if architecture is SMALL_ESM2 else (DnabertS, mean_over_tokens)
    return pool(family(architecture, weights, dtype, max(lengths) + 2, elementwise=elementwise)(pack), pack)
