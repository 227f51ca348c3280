"""The audit's reference of DNABERT-S (Zhou et al. 2024, arXiv:2402.08777), every score and bias written out.

The published code is MAGICS-LAB/DNABERT_S, `evaluate/model_codes/bert_layers.py`; here for a single sequence.
"""

import math
from functools import partial

import torch

from seqmill.embedding.references.reference import (
    FFN_TOKENS,
    Embed,
    Reference,
    Tensors,
    attention,
    by_pieces,
    score_bytes,
    written_out,
)
from seqmill.spec.architectures import DnabertArchitecture

# Cost of the passes over the scores per head and pair of tokens, in operations of the matrix products; fitted, see
# docs/explanation/accuracy.md.
SCORE_OPERATIONS = 500


def make(architecture: DnabertArchitecture, tensors: Tensors, max_tokens: int) -> Reference:
    """Return the reference; it takes segments of any length."""
    return written_out("DNABERT-S", _embed(architecture, tensors))


def memory(architecture: DnabertArchitecture, num_tokens: int) -> int:
    """Return the bytes that a segment needs in addition to the weights."""
    scores = score_bytes(architecture.num_heads, num_tokens)
    return scores + 4 * architecture.hidden_dim * (8 * num_tokens + 20 * min(FFN_TOKENS, num_tokens))


def _embed(architecture: DnabertArchitecture, tensors: Tensors) -> Embed:
    weights = {name: tensor.float() for name, (tensor,) in tensors.items()}
    d, heads = architecture.hidden_dim, architecture.num_heads
    slopes = _slopes(heads)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centered = x - x.mean(dim=1, keepdim=True)
        spread = (centered.square().mean(dim=1, keepdim=True) + 1e-12).sqrt()
        return centered / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def add_biases(scores: torch.Tensor, queries: torch.Tensor) -> None:
        distances = (queries[:, None] - torch.arange(scores.shape[2])).abs().float()
        for head, slope in enumerate(slopes):
            scores[head] -= slope * distances

    def feed_forward(x: torch.Tensor, layer: str) -> torch.Tensor:
        wide = x @ weights[f"{layer}gated.weight"].T
        gate, value = wide[:, : 4 * d], wide[:, 4 * d :]
        delta = linear(0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))) * value, f"{layer}down")
        return norm(delta + x, f"{layer}ffn_norm")

    def embed(tokens: torch.Tensor, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
        x = norm(weights["embed.weight"][tokens] + weights["token_type.weight"][0], "embed_norm")
        found = {0: x}
        for number in range(architecture.num_layers):
            layer = f"layers.{number}."
            q, k, v = linear(x, f"{layer}qkv").view(len(x), 3, heads, d // heads).permute(1, 2, 0, 3)
            attended = attention(q, k, v, (d // heads) ** -0.5, add_biases)
            x = norm(linear(attended, f"{layer}out") + x, f"{layer}attention_norm")
            x = by_pieces(partial(feed_forward, layer=layer), x)
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
