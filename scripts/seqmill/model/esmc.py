"""ESM C, as a plain forward over packs.

The reference is `EsmcModel` of transformers 5.16 and later, run in float32; the weights are those of the esm package
(EvolutionaryScale 2024, Biohub 2026, `esm/models/esmc`). ESM-2's tokens and rotation; a layer norm of all queries of a
token, and of all keys, before the rotation; a gated feed-forward with SiLU (Shazeer 2020, arXiv:2002.05202); no biases
but in the norms before attention and feed-forward.

The reference divides what each step adds to the residual stream by sqrt(num_layers / 36). Here the whole stream is
that factor larger instead: norms do not see it if the number that is added to the variance grows by its square.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from seqmill.model.attention import QKNorms, attend
from seqmill.model.elementwise import EAGER, TRITON, gate
from seqmill.model.esm2 import LAYER_NORM_EPS, rope_tables
from seqmill.model.layers import Linear, Norm, feed_forward_tokens, parameter
from seqmill.model.pack import Pack
from seqmill.spec.architectures import EsmcArchitecture

UNSCALED_LAYERS = 36


class ESMC(torch.nn.Module):
    """The encoder of ESM C.

    Matrix products run in `dtype`; the residual stream, layer norms and rotary tables stay in float32
    (float64 if that is the dtype). The arguments are those of `esm2.ESM2`.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        architecture: EsmcArchitecture,
        weights: dict[str, torch.Tensor],
        dtype: torch.dtype,
        max_tokens: int,
        attention: str = "sdpa",
        elementwise: str = EAGER,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.attention = attention
        self.exact = torch.float64 if dtype == torch.float64 else torch.float32
        self.elementwise = elementwise
        self.scale = math.sqrt(architecture.num_layers / UNSCALED_LAYERS)
        eps = LAYER_NORM_EPS * self.scale**2
        self.embed = parameter(weights["embed.weight"].to(self.exact) * self.scale, self.exact)
        self.layers = torch.nn.ModuleList(
            Layer(architecture, weights, f"layers.{layer}.", dtype, self.exact, elementwise, eps)
            for layer in range(architecture.num_layers)
        )
        self.final_norm = Norm(weights, "final_norm.", eps, self.exact, self.exact, elementwise)
        cos, sin = self._tables(max_tokens)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _tables(self, max_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        # The reference computes angles in float32, whatever the model's dtype.
        cos, sin = rope_tables(max_tokens, self.architecture.head_dim, torch.float32)
        return cos.to(self.exact), sin.to(self.exact)

    def reserve(self, max_tokens: int) -> None:
        """Make the tables of positions long enough for a segment of `max_tokens` tokens."""
        if max_tokens > len(self.cos):
            cos, sin = (table.to(self.cos.device) for table in self._tables(max_tokens))
            self.sin = sin
            self.cos = cos  # last: its length decides, and an interrupted call is repeated

    @torch.inference_mode()
    def forward(self, pack: Pack) -> torch.Tensor:
        """Return the hidden states after the last layer and its layer norm, (num_tokens, hidden_dim).

        float32, or float64 for a float64 model.
        """
        ((_, hidden),) = self.hidden_states(pack, (len(self.layers),))
        return hidden

    def hidden_states(self, pack: Pack, layers: tuple[int, ...]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield some layers' numbers and hidden states, in ascending order; the next one may overwrite them.

        0 is the embedding of the tokens, k the output of block k, the last after the final layer norm.
        """
        x, delta = F.embedding(pack.tokens.int(), self.embed), None
        for number, layer in enumerate(self.layers):
            if number in layers:
                yield number, (x if delta is None else x + delta) / self.scale
            if number >= max(layers):
                return
            delta = layer(x, delta, self.attention, self.cos, self.sin, pack)
        yield len(self.layers), self.final_norm.pre(x, delta)


class Layer(torch.nn.Module):
    """A pre-norm transformer block; takes the residual stream and the delta to add to it, returns the next delta."""

    q_norm: torch.Tensor
    k_norm: torch.Tensor

    def __init__(
        self,
        architecture: EsmcArchitecture,
        weights: dict[str, torch.Tensor],
        prefix: str,
        dtype: torch.dtype,
        exact: torch.dtype,
        elementwise: str,
        eps: float,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = architecture.num_heads, architecture.head_dim
        self.elementwise = elementwise
        self.widest = 2 * architecture.ffn_dim * dtype.itemsize  # bytes of a token, both halves of the gate
        self.attention_norm = Norm(weights, prefix + "attention_norm.", eps, exact, dtype, elementwise)
        self.qkv = Linear(weights, prefix + "qkv.", dtype)
        self.q_norm = parameter(weights[prefix + "q_norm.weight"], exact)
        self.k_norm = parameter(weights[prefix + "k_norm.weight"], exact)
        self.out = Linear(weights, prefix + "out.", dtype)
        self.ffn_norm = Norm(weights, prefix + "ffn_norm.", eps, exact, dtype, elementwise)
        self.gated = Linear(weights, prefix + "gated.", dtype)
        self.down = Linear(weights, prefix + "down.", dtype)

    def forward(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        attention: str,
        cos: torch.Tensor,
        sin: torch.Tensor,
        pack: Pack,
    ) -> torch.Tensor:
        qkv = self.qkv(self.attention_norm.pre(x, delta)).view(-1, 3, self.num_heads, self.head_dim)
        norms: QKNorms = (self.q_norm, self.k_norm, LAYER_NORM_EPS)
        attended = attend(attention, qkv, cos, sin, pack, self.elementwise == TRITON, norms)
        del qkv  # the largest tensor of a long sequence
        pieces = self.ffn_norm.pre(x, self.out(attended)).split(feed_forward_tokens(len(x), x.device, self.widest))
        return self._feed_forward(pieces[0]) if len(pieces) == 1 else torch.cat([*map(self._feed_forward, pieces)])

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(gate(self.elementwise, self.gated(x), silu=True))


def parameter_shapes(architecture: EsmcArchitecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its canonical name."""
    d, ffn = architecture.hidden_dim, architecture.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (architecture.vocabulary, d)}
    for layer in range(architecture.num_layers):
        prefix = f"layers.{layer}."
        for name, shape in {"qkv": (3 * d, d), "out": (d, d), "gated": (2 * ffn, d), "down": (d, ffn)}.items():
            shapes[f"{prefix}{name}.weight"] = shape
        for name in ("attention_norm", "ffn_norm"):
            shapes[f"{prefix}{name}.weight"] = shapes[f"{prefix}{name}.bias"] = (d,)
        shapes[f"{prefix}q_norm.weight"] = shapes[f"{prefix}k_norm.weight"] = (d,)
    shapes["final_norm.weight"] = (d,)
    return shapes
