"""A reference's type, and attention and loading as all references that are written out have them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Scores that a written-out model holds at a time, over all heads: 64 MB, and up to three times that while they are
# computed.
SCORES = 1 << 24
FFN_TOKENS = 2048  # that go through a feed-forward at a time

# Tensors by canonical name; those of a list are to be joined by rows.
Tensors = dict[str, list[torch.Tensor]]
# From a segment's tokens, int64 (num_tokens,), special ones included, and layers from 0 on, to each layer's hidden
# states, float32 (num_tokens, hidden_dim).
Embed = Callable[[torch.Tensor, tuple[int, ...]], dict[int, torch.Tensor]]
# Adds to the scores (heads, num_queries, num_tokens) of the tokens at these positions (num_queries,).
AddBiases = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Reference:
    """A model to compare with, and its name for reports."""

    name: str
    embed: Embed


def written_out(title: str, embed: Embed) -> Reference:
    """Return the reference of a family whose model is written out."""
    return Reference(f"{title} written out in float32, one segment at a time", embed)


def matrices(tensors: Tensors, name: str, count: int) -> list[torch.Tensor]:
    """Return the `count` matrices that a file may hold as one, float32."""
    parts = tensors[name]
    return [part.float() for part in (parts if len(parts) == count else torch.cat(parts).chunk(count))]


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, add_biases: AddBiases | None = None
) -> torch.Tensor:
    """Map (heads, num_tokens, head_dim) to (num_tokens, heads * head_dim), a block of queries at a time."""
    heads, num_tokens, head_dim = q.shape
    positions = torch.arange(num_tokens)
    # Allocated at once: small pieces that outlive large ones would fragment the heap.
    attended = torch.empty(num_tokens, heads * head_dim)
    for queries in positions.split(max(SCORES // (heads * num_tokens), 1)):
        scores = (q[:, queries] * scale) @ k.transpose(1, 2)
        if add_biases is not None:
            add_biases(scores, queries)
        attended[queries] = (scores.softmax(dim=2) @ v).transpose(0, 1).reshape(len(queries), heads * head_dim)
    return attended


def by_pieces(step: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply a step to (num_tokens, hidden_dim), FFN_TOKENS tokens at a time."""
    return torch.cat([step(piece) for piece in x.split(FFN_TOKENS)])


def score_bytes(num_heads: int, num_tokens: int) -> int:
    """Return the bytes that `attention` needs for scores, those of one query at least."""
    return 3 * 4 * max(SCORES, num_heads * num_tokens)
