"""The audit's references: each family's model and pooling implemented another time, for one segment at a time.

The models compute in float32 on the CPU:

| family | reference |
|---|---|
| ESM-2 | fair-esm 2.0.0 (Lin et al. 2023, doi:10.1126/science.ade2574), or our own forward if it can't be imported |
| DNABERT-S | the model written out here, every score and bias (Zhou et al. 2024, arXiv:2402.08777) |
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from seqmill.model.esm2 import ESM2, ROPE_BASE
from seqmill.model.esm2_weights import FAIR_ESM
from seqmill.model.pack import Pack
from seqmill.spec.families import DNABERT_S, Family
from seqmill.spec.models import Architecture, DnabertArchitecture, Esm2Architecture

# fair-esm keeps the scores and the probabilities of all heads, and averages them.
ATTENTION_BYTES = 12  # per head and pair of tokens
# Scores that the written-out DNABERT-S holds at a time, over all heads: 64 MB, and twice that while they are computed.
SCORES = 1 << 24
FFN_TOKENS = 2048
# Cost of the passes over the scores per head and pair of tokens, in operations of the matrix products; fitted, see
# docs/explanation/accuracy.md.
ESM2_SCORE_OPERATIONS, DNABERT_SCORE_OPERATIONS = 400, 500

log = logging.getLogger(__name__)

# Tensors by canonical name; those of a list are to be joined by rows.
Tensors = dict[str, list[torch.Tensor]]
# From a segment's tokens, int64 (num_tokens,), special ones included, and layers from 0 on, to each layer's hidden
# states, float32 (num_tokens, hidden_dim).
Embed = Callable[[torch.Tensor, tuple[int, ...]], dict[int, torch.Tensor]]


@dataclass(frozen=True)
class Reference:
    """A model to compare with, and its name for reports."""

    name: str
    embed: Embed


def make_reference(architecture: Architecture, tensors: Tensors, max_tokens: int) -> Reference:
    """Return the reference of a model's family, for segments of up to `max_tokens` tokens."""
    if isinstance(architecture, DnabertArchitecture):
        return Reference("DNABERT-S written out in float32, one segment at a time", _dnabert(architecture, tensors))
    assert isinstance(architecture, Esm2Architecture)
    try:
        import esm

        _ = esm.ESM2  # another package of this name has none
    except Exception as error:  # it is optional: however it is broken, the shard must not fail
        log.info("the audit runs without fair-esm: %s: %s", type(error).__name__, error)
        return Reference("seqmill float32, one sequence at a time", _our_own(architecture, tensors, max_tokens))
    return Reference(f"fair-esm {esm.__version__} float32", _fair_esm(architecture, tensors))


def operations(architecture: Architecture, num_tokens: int) -> float:
    """Return a segment's operations in a layer: matrix products, and passes over the attention scores."""
    d, heads = architecture.hidden_dim, architecture.num_heads
    a_score = DNABERT_SCORE_OPERATIONS if isinstance(architecture, DnabertArchitecture) else ESM2_SCORE_OPERATIONS
    products = 2 * architecture.matrix_parameters / architecture.num_layers
    return products * num_tokens + (4 * d + a_score * heads) * num_tokens**2


def memory(architecture: Architecture, num_tokens: int) -> int:
    """Return the bytes that a segment needs in addition to the weights."""
    if isinstance(architecture, DnabertArchitecture):
        scores = 3 * 4 * max(SCORES, architecture.num_heads * num_tokens)  # of one query at least
        return scores + 4 * architecture.hidden_dim * (8 * num_tokens + 20 * min(FFN_TOKENS, num_tokens))
    return ATTENTION_BYTES * architecture.num_heads * num_tokens**2


def _dnabert(architecture: DnabertArchitecture, tensors: Tensors) -> Embed:
    """The published code (MAGICS-LAB/DNABERT_S, `evaluate/model_codes/bert_layers.py`), for a single sequence."""
    weights = {name: tensor.float() for name, (tensor,) in tensors.items()}
    d, heads = architecture.hidden_dim, architecture.num_heads
    slopes = torch.tensor(_slopes(heads))

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centered = x - x.mean(dim=1, keepdim=True)
        spread = (centered.square().mean(dim=1, keepdim=True) + 1e-12).sqrt()
        return centered / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Map (heads, num_tokens, head_dim) to (num_tokens, d), as many queries at a time as SCORES allows."""
        places = torch.arange(q.shape[1])
        # Allocated at once: small pieces that outlive large ones would fragment the heap.
        attended = torch.empty(len(places), d)
        for queries in places.split(max(SCORES // (heads * len(places)), 1)):
            scores = q[:, queries] @ k.transpose(1, 2) / math.sqrt(d // heads)
            distances = (queries[:, None] - places).abs().float()
            for head, slope in enumerate(slopes):
                scores[head] -= slope * distances
            attended[queries] = (scores.softmax(dim=2) @ v).transpose(0, 1).reshape(len(queries), d)
        return attended

    def feed_forward(x: torch.Tensor, layer: str) -> torch.Tensor:
        wide = x @ weights[f"{layer}gated.weight"].T
        gate, value = wide[:, : 4 * d], wide[:, 4 * d :]
        return linear(0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))) * value, f"{layer}down")

    def embed(tokens: torch.Tensor, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
        x = norm(weights["embed.weight"][tokens] + weights["token_type.weight"][0], "embed_norm")
        found = {0: x}
        for number in range(architecture.num_layers):
            layer = f"layers.{number}."
            q, k, v = linear(x, f"{layer}qkv").view(len(x), 3, heads, d // heads).permute(1, 2, 0, 3)
            x = norm(linear(attention(q, k, v), f"{layer}out") + x, f"{layer}attention_norm")
            x = torch.cat([norm(feed_forward(y, layer) + y, f"{layer}ffn_norm") for y in x.split(FFN_TOKENS)])
            if number + 1 in layers:
                found[number + 1] = x
        return found

    return embed


def _slopes(num_heads: int) -> list[float]:
    """Return each head's penalty per token of distance (Press et al. 2022, arXiv:2108.12409)."""
    if num_heads.bit_count() == 1:
        return [2 ** (-8 * head / num_heads) for head in range(1, num_heads + 1)]
    below = 2 ** math.floor(math.log2(num_heads))
    return _slopes(below) + _slopes(2 * below)[::2][: num_heads - below]


def _fair_esm(architecture: Esm2Architecture, tensors: Tensors) -> Embed:
    import esm

    num_layers = architecture.num_layers
    with _WithoutValues():  # they are replaced at once
        d, heads = architecture.hidden_dim, architecture.num_heads
        model = esm.ESM2(num_layers, d, heads, token_dropout=architecture.token_dropout)
    model.lm_head = torch.nn.Identity()  # our weights lack these two
    model.contact_head = torch.nn.Identity()
    model.load_state_dict(_fair_esm_state(architecture, tensors), strict=True, assign=True)
    model.eval()

    def embed(tokens: torch.Tensor, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
        found = model(tokens[None], repr_layers=layers)["representations"]
        return {layer: hidden[0] for layer, hidden in found.items()}

    return embed


class _WithoutValues(TorchFunctionMode):
    """Gives a model's parameters neither values nor memory.

    With `torch.device("meta")` alone, fair-esm would also compute its rotary frequencies and normal numbers on that
    device, for which torch imports its compiler: that takes a second.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func is torch.nn.init.normal_:
            return kwargs["tensor"]
        return func(*args, **(kwargs | {"device": "meta"} if func is torch.empty else kwargs))


def _fair_esm_state(architecture: Esm2Architecture, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return the tensors by fair-esm's names."""
    head_dim = architecture.head_dim
    # As esm/rotary_embedding.py computes it.
    inv_freq = 1.0 / (ROPE_BASE ** (torch.arange(0, head_dim, 2).float() / head_dim))
    state = {f"{FAIR_ESM.layer.format(n)}self_attn.rot_emb.inv_freq": inv_freq for n in range(architecture.num_layers)}
    for parameter, parts in tensors.items():
        names = FAIR_ESM.names_of(parameter)
        pieces = parts if len(parts) == len(names) else parts[0].chunk(len(names))
        state.update({name: piece.float() for name, piece in zip(names, pieces, strict=True)})
    return state


def _our_own(architecture: Esm2Architecture, tensors: Tensors, max_tokens: int) -> Embed:
    whole = {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in tensors.items()}
    model = ESM2(architecture, whole, torch.float32, max_tokens, "sdpa")

    def embed(tokens: torch.Tensor, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
        pack = Pack.from_tokens(tokens.numpy(), np.array([len(tokens)], np.int64))
        return {layer: hidden.clone() for layer, hidden in model.hidden_states(pack, layers)}

    return embed


def blend(hidden: list[dict[int, torch.Tensor]], stride: int, family: Family) -> dict[int, torch.Tensor]:
    """Blend the hidden states of a protein's windows, as `seqmill.embedding.embedder` does, but in float64."""
    found, special = {}, family.before + family.after
    for layer in hidden[0]:
        windows = [states[layer].double().numpy() for states in hidden]
        sums = np.zeros((stride * (len(windows) - 1) + len(windows[-1]), windows[0].shape[1]))
        shares = np.zeros((len(sums), 1))
        for number, states in enumerate(windows):
            n = len(states) - special
            share = np.minimum(np.arange(n) + 1, n - np.arange(n))
            share = np.pad(share, (family.before, family.after))[:, None]
            sums[number * stride : number * stride + len(states)] += share * states
            shares[number * stride : number * stride + len(states)] += share
        lengths = [len(window) - special for window in windows]
        for end in (*range(family.before), *range(-family.after, 0)):
            sums[end] = np.average([states[end] for states in windows], axis=0, weights=lengths)
            shares[end] = 1
        found[layer] = torch.from_numpy(sums / shares)
    return found


def pool(hidden: list[torch.Tensor], weights: np.ndarray, family: Family, pooling: str) -> np.ndarray:
    """Pool the hidden states of a sequence's segments into its vector, float64."""
    inner, first, whole = slice(family.before, -family.after), slice(0, 1), slice(None)
    used = first if pooling == "cls" else whole if (family, pooling) == (DNABERT_S, "mean") else inner
    tokens = [states[used].double().numpy() for states in hidden]
    if pooling == "max":
        return np.concatenate(tokens).max(axis=0)

    def average(values: list[np.ndarray]) -> np.ndarray:
        return np.average([of_segment.mean(axis=0) for of_segment in values], axis=0, weights=weights)

    mean = average(tokens)
    return np.sqrt(average([(of_segment - mean) ** 2 for of_segment in tokens])) if pooling == "std" else mean
