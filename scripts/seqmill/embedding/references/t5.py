"""The audit's reference of ProtT5 and ProstT5: T5's encoder written out after `T5EncoderModel` of transformers 5.23."""

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
from seqmill.spec.architectures import T5Architecture

# Cost of the passes over the scores per head and pair of tokens, in operations of the matrix products; fitted, see
# docs/explanation/accuracy.md.
SCORE_OPERATIONS = 300


def make(architecture: T5Architecture, tensors: Tensors, max_tokens: int) -> Reference:
    """Return the reference; it takes segments of any length."""
    return written_out(architecture.family.title, _embed(architecture, tensors))


def memory(architecture: T5Architecture, num_tokens: int) -> int:
    """Return the bytes that a segment needs in addition to the weights."""
    scores = score_bytes(architecture.num_heads, num_tokens)
    width = 5 * architecture.inner_dim + 4 * architecture.hidden_dim
    return scores + 4 * (width * num_tokens + 3 * architecture.ffn_dim * min(FFN_TOKENS, num_tokens))


def bucket(distance: int, each_way: int, max_distance: int) -> int:
    """Return the bucket, of those for one direction, of a key `distance` tokens from its query.

    Half of them have one distance each. The others divide the distances up to `max_distance` by their logarithms; in
    whole numbers, so that no rounding decides: a distance is in the bucket exact + n or above, with m such buckets, if
    (distance / exact)^m >= (max_distance / exact)^n.
    """
    exact = each_way // 2
    if distance < exact:
        return distance
    m = each_way - exact
    above = (n for n in range(m) if distance**m * exact**n >= max_distance**n * exact**m)
    return exact + max(above)


def _embed(architecture: T5Architecture, tensors: Tensors) -> Embed:
    heads, head_dim, most = architecture.num_heads, architecture.head_dim, architecture.max_distance
    weights = {name: matrices(tensors, name, 3 if ".qkv." in name else 1) for name in tensors}
    each_way = architecture.buckets // 2
    before = [bucket(distance, each_way, most) for distance in range(most, -1, -1)]
    after = [each_way + bucket(distance, each_way, most) for distance in range(1, most + 1)]
    # (heads, 2 * most + 1): the biases of keys `most` tokens before a query, then nearer, then after it.
    biases = weights["relative_bias.weight"][0][before + after].T

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"][0]

    def add_biases(scores: torch.Tensor, queries: torch.Tensor) -> None:
        offsets = (torch.arange(scores.shape[2]) - queries[:, None]).clamp(-most, most) + most
        for of_head, of_offset in zip(scores, biases, strict=True):
            of_head += of_offset[offsets]

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), heads, head_dim).transpose(0, 1)

    def attend(x: torch.Tensor, layer: str) -> torch.Tensor:
        q, k, v = (by_head(x @ matrix.T) for matrix in weights[f"{layer}qkv.weight"])
        return attention(q, k, v, 1.0, add_biases) @ weights[f"{layer}out.weight"][0].T

    def feed_forward(x: torch.Tensor, layer: str) -> torch.Tensor:
        up, down = weights[f"{layer}up.weight"][0], weights[f"{layer}down.weight"][0]
        return (x @ up.T).clamp_min_(0) @ down.T

    def embed(tokens: torch.Tensor, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
        x = weights["embed.weight"][0][tokens]
        found = {0: x}
        for number in range(architecture.num_layers):
            layer = f"layers.{number}."
            x = x + attend(norm(x, f"{layer}attention_norm"), layer)
            x = x + by_pieces(partial(feed_forward, layer=layer), norm(x, f"{layer}ffn_norm"))
            if number + 1 in layers:
                found[number + 1] = x
        if architecture.num_layers in layers:
            found[architecture.num_layers] = norm(x, "final_norm")
        return found

    return embed
