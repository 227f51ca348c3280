"""The audit's reference of ESM-2: fair-esm 2.0.0 (Lin et al. 2023, doi:10.1126/science.ade2574).

It is our own forward, one sequence at a time, if fair-esm can't be imported.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from seqmill.embedding.references.reference import Embed, Reference, Tensors
from seqmill.model.esm2 import ESM2, ROPE_BASE
from seqmill.model.esm2_weights import FAIR_ESM
from seqmill.model.pack import Pack
from seqmill.spec.architectures import Esm2Architecture

# fair-esm keeps the scores and the probabilities of all heads, and averages them.
ATTENTION_BYTES = 12  # per head and pair of tokens
# Cost of the passes over the scores per head and pair of tokens, in operations of the matrix products; fitted, see
# docs/explanation/accuracy.md.
SCORE_OPERATIONS = 400

log = logging.getLogger(__name__)


def make(architecture: Esm2Architecture, tensors: Tensors, max_tokens: int) -> Reference:
    """Return the reference for segments of up to `max_tokens` tokens."""
    try:
        import esm

        _ = esm.ESM2  # another package of this name has none
    except Exception as error:  # it is optional: however it is broken, the shard must not fail
        log.info("the audit runs without fair-esm: %s: %s", type(error).__name__, error)
        return Reference("seqmill float32, one sequence at a time", _our_own(architecture, tensors, max_tokens))
    return Reference(f"fair-esm {esm.__version__} float32", _fair_esm(architecture, tensors))


def memory(architecture: Esm2Architecture, num_tokens: int) -> int:
    """Return the bytes that a segment needs in addition to the weights."""
    return ATTENTION_BYTES * architecture.num_heads * num_tokens**2


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
