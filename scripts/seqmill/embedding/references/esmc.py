"""The audit's reference of ESM C, written out after `EsmcModel` of transformers 5.23, for a single sequence."""

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
    matrices,
    score_bytes,
    written_out,
)
from seqmill.spec.architectures import EsmcArchitecture

# Cost of the passes over the scores per head and pair of tokens, in operations of the matrix products; fitted, see
# docs/explanation/accuracy.md.
SCORE_OPERATIONS = 300


def make(architecture: EsmcArchitecture, tensors: Tensors, max_tokens: int) -> Reference:
    """Return the reference; it takes segments of any length."""
    return written_out("ESM C", _embed(architecture, tensors))


def memory(architecture: EsmcArchitecture, num_tokens: int) -> int:
    """Return the bytes that a segment needs in addition to the weights."""
    scores = score_bytes(architecture.num_heads, num_tokens)
    wide = 5 * architecture.ffn_dim * min(FFN_TOKENS, num_tokens)
    return scores + 4 * (10 * architecture.hidden_dim * num_tokens + wide)


def _embed(architecture: EsmcArchitecture, tensors: Tensors) -> Embed:
    heads, head_dim = architecture.num_heads, architecture.head_dim
    divisor = math.sqrt(architecture.num_layers / 36)
    split = {"qkv": 3, "gated": 2}  # by the last word but one of a matrix's name
    weights = {name: matrices(tensors, name, split.get(name.split(".")[-2], 1)) for name in tensors}
    frequencies = 10000 ** -(torch.arange(0, head_dim, 2) / head_dim)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centered = x - x.mean(dim=1, keepdim=True)
        x = centered / (centered.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"][0]
        return x + weights[f"{name}.bias"][0] if f"{name}.bias" in weights else x

    def rotate(x: torch.Tensor) -> torch.Tensor:
        """Turn each pair of channels, half a head apart, by the angle of its position (Su et al. 2021, RoPE)."""
        angles = torch.arange(x.shape[1])[:, None] * frequencies
        first, second = x.chunk(2, dim=2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=2)

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), heads, head_dim).transpose(0, 1)

    def attend(x: torch.Tensor, layer: str) -> torch.Tensor:
        to_q, to_k, to_v = weights[f"{layer}qkv.weight"]
        q = rotate(by_head(norm(x @ to_q.T, f"{layer}q_norm")))
        k = rotate(by_head(norm(x @ to_k.T, f"{layer}k_norm")))
        return attention(q, k, by_head(x @ to_v.T), head_dim**-0.5) @ weights[f"{layer}out.weight"][0].T

    def feed_forward(x: torch.Tensor, layer: str) -> torch.Tensor:
        to_gate, to_value = weights[f"{layer}gated.weight"]
        gate = x @ to_gate.T
        return gate * torch.sigmoid(gate) * (x @ to_value.T) @ weights[f"{layer}down.weight"][0].T

    def embed(tokens: torch.Tensor, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
        x = weights["embed.weight"][0][tokens]
        found = {0: x}
        for number in range(architecture.num_layers):
            layer = f"layers.{number}."
            x = x + attend(norm(x, f"{layer}attention_norm"), layer) / divisor
            x = x + by_pieces(partial(feed_forward, layer=layer), norm(x, f"{layer}ffn_norm")) / divisor
            if number + 1 in layers:
                found[number + 1] = x
        if architecture.num_layers in layers:
            found[architecture.num_layers] = norm(x, "final_norm")
        return found

    return embed
