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
    pack, family = one_pack(sequences), weights.architecture.family
    model = make_model(weights, dtype, int(pack.lengths.max()), kernel)
    hidden_error, layers = 0.0, range(weights.architecture.num_layers + 1)
    with torch.inference_mode():
        for layer, hidden in model.hidden_states(pack, tuple(layers)):
            for found, states in zip(hidden.split(pack.lengths.tolist()), expected, strict=True):
                errors = (found - states[layer]).norm(dim=-1) / states[layer].norm(dim=-1)
                hidden_error = max(hidden_error, errors.max().item())
        assert layer == layers[-1]
        means = mean_over_residues(hidden, pack, family.before, family.after).double()
    exact = torch.stack(
        [states[-1, family.before : states.shape[1] - family.after].double().mean(dim=0) for states in expected]
    )
    mean_errors = (means - exact).norm(dim=1) / exact.norm(dim=1)
    return Errors(hidden_error, mean_errors.max().item(), torch.cosine_similarity(means, exact).min().item())
