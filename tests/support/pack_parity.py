"""The hidden states of every layer over one pack, compared with a reference's, sequence by sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from seqmill.embedding.pooling import mean_over_residues
from seqmill.model.elementwise import EAGER
from seqmill.model.encoder import Encoder, pack_weights
from seqmill.model.families import IMPLEMENTATIONS
from seqmill.model.kernels import compiled
from seqmill.model.pack import Pack
from seqmill.model.weights import Weights


@dataclass(frozen=True)
class Errors:
    """The worst of all sequences: relative L2 errors of a token in any layer and of a mean, a mean's lowest cosine."""

    hidden: float
    mean: float
    cosine: float

    def __str__(self) -> str:
        return f"hidden {self.hidden:.2e}, mean {self.mean:.2e}, cosine {self.cosine:.7f}"


def one_pack(sequences: Sequence[Sequence[int]]) -> Pack:
    """Return sequences of tokens as one pack in the given order."""
    lengths = np.array([len(tokens) for tokens in sequences], np.int64)
    return Pack.from_tokens(np.concatenate([np.array(tokens, np.uint8) for tokens in sequences]), lengths)


def kernels_of(dtype: torch.dtype) -> list[str]:
    """Return sdpa, and our own kernels for a dtype that this machine can run."""
    ours = [name for name, kernel in compiled.KERNELS.items() if kernel.dtype == dtype and not compiled.why_not(name)]
    return ["sdpa", *ours]


def make_model(weights: Weights, dtype: torch.dtype, max_tokens: int, kernel: str) -> Encoder:
    """Return a model with one kernel for attention and the elementwise steps; with sdpa, all steps are PyTorch's."""
    elementwise = EAGER if kernel == "sdpa" else kernel
    encoder = IMPLEMENTATIONS[weights.architecture.family].encoder
    model = encoder(weights.architecture, weights.tensors, dtype, max_tokens, kernel, elementwise)
    if kernel != "sdpa":
        pack_weights(model)
    return model


@torch.inference_mode()
def all_layers(model: Encoder, pack: Pack) -> torch.Tensor:
    """Return the hidden states of every layer, (num_layers + 1, num_tokens, hidden_dim)."""
    numbers = tuple(range(model.architecture.num_layers + 1))
    layers = [(number, hidden.clone()) for number, hidden in model.hidden_states(pack, numbers)]
    assert tuple(number for number, _ in layers) == numbers
    return torch.stack([hidden for _, hidden in layers])


def worst_errors(
    weights: Weights, sequences: list[list[int]], expected: list[torch.Tensor], dtype: torch.dtype, kernel: str
) -> Errors:
    """Compare one pack of `sequences` with a reference's hidden states (num_layers + 1, tokens, hidden_dim) of each."""
    pack = one_pack(sequences)
    layers = all_layers(make_model(weights, dtype, int(pack.lengths.max()), kernel), pack)
    family = weights.architecture.family
    means = mean_over_residues(layers[-1], pack, family.before, family.after).double()
    hidden_errors, mean_errors, cosines = [], [], []
    for found, mean, states in zip(layers.split(pack.lengths.tolist(), dim=1), means, expected, strict=True):
        for layer, reference in zip(found, states, strict=True):
            hidden_errors.append(((layer - reference).norm(dim=-1) / reference.norm(dim=-1)).max().item())
        exact = states[-1, family.before : states.shape[1] - family.after].double().mean(dim=0)
        mean_errors.append(((mean - exact).norm() / exact.norm()).item())
        cosines.append(torch.cosine_similarity(mean, exact, dim=0).item())
    return Errors(max(hidden_errors), max(mean_errors), min(cosines))
