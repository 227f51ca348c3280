"""The encoder of T5 as ProtT5 and ProstT5 use it, as a plain forward over packs.

The reference is `T5EncoderModel` of transformers, run in float32: ProtT5 (Elnaggar et al. 2022,
doi:10.1109/TPAMI.2021.3095381) and ProstT5 (Heinzinger et al. 2024, doi:10.1093/nargab/lqae150) have the shape of T5's
3B model (Raffel et al. 2020, arXiv:1910.10683). RMS norms, no biases, a bias by relative position on scores that are
not scaled, a feed-forward with ReLU. Here there is no padding, one GEMM for query, key and value, and no decoder.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from seqmill.model.elementwise import EAGER
from seqmill.model.layers import Linear, Norm, feed_forward_tokens, parameter
from seqmill.model.pack import Pack
from seqmill.model.relative import attend, make_biases
from seqmill.spec.architectures import T5Architecture

RMS_NORM_EPS = 1e-6


class T5Encoder(torch.nn.Module):
    """The encoder of T5.

    Matrix products run in `dtype`; the residual stream, norms and attention biases stay in float32
    (float64 if that is the dtype).

    The arguments are those of `esm2.ESM2`; `attention` is a name from `seqmill.model.relative.choose_kernel`.
    """

    biases: torch.Tensor

    def __init__(
        self,
        architecture: T5Architecture,
        weights: dict[str, torch.Tensor],
        dtype: torch.dtype,
        max_tokens: int,
        attention: str = "sdpa",
        elementwise: str = EAGER,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.attention = attention
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        self.elementwise = elementwise
        self.embed = parameter(weights["embed.weight"], exact)
        self.bucket_biases = parameter(weights["relative_bias.weight"], exact)
        self.layers = torch.nn.ModuleList(
            Layer(architecture, weights, f"layers.{layer}.", dtype, exact, elementwise)
            for layer in range(architecture.num_layers)
        )
        self.final_norm = Norm(weights, "final_norm.", RMS_NORM_EPS, exact, exact, elementwise, centered=False)
        self.max_tokens = max_tokens
        self.register_buffer("biases", self._make_biases(max_tokens), persistent=False)

    def _make_biases(self, max_tokens: int) -> torch.Tensor:
        return make_biases(self.attention, self.bucket_biases, self.architecture.max_distance, max_tokens)

    def reserve(self, max_tokens: int) -> None:
        """Make the table of biases long enough for a segment of `max_tokens` tokens."""
        if max_tokens > self.max_tokens:
            self.biases = self._make_biases(max_tokens)
            self.max_tokens = max_tokens  # last: an interrupted call is repeated

    @torch.inference_mode()
    def forward(self, pack: Pack) -> torch.Tensor:
        """Return the hidden states after the last layer and its norm, (num_tokens, hidden_dim).

        float32, or float64 for a float64 model.
        """
        ((_, hidden),) = self.hidden_states(pack, (len(self.layers),))
        return hidden

    def hidden_states(self, pack: Pack, layers: tuple[int, ...]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield some layers' numbers and hidden states, in ascending order; the next one may overwrite them.

        0 is the embedding of the tokens, k the output of block k, the last after the final norm, as in transformers.
        """
        x, delta = F.embedding(pack.tokens.int(), self.embed), None
        for number, layer in enumerate(self.layers):
            if number in layers:
                yield number, x if delta is None else x + delta
            if number >= max(layers):
                return
            delta = layer(x, delta, self.attention, self.biases, pack)
        yield len(self.layers), self.final_norm.pre(x, delta)


class Layer(torch.nn.Module):
    """A pre-norm transformer block; takes the residual stream and the delta to add to it, returns the next delta."""

    def __init__(
        self,
        architecture: T5Architecture,
        weights: dict[str, torch.Tensor],
        prefix: str,
        dtype: torch.dtype,
        exact: torch.dtype,
        elementwise: str,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = architecture.num_heads, architecture.head_dim
        self.widest = architecture.ffn_dim * dtype.itemsize  # bytes of a token
        norm_settings = RMS_NORM_EPS, exact, dtype, elementwise
        self.attention_norm = Norm(weights, prefix + "attention_norm.", *norm_settings, centered=False)
        self.qkv = Linear(weights, prefix + "qkv.", dtype)
        self.out = Linear(weights, prefix + "out.", dtype)
        self.ffn_norm = Norm(weights, prefix + "ffn_norm.", *norm_settings, centered=False)
        self.up = Linear(weights, prefix + "up.", dtype, activation="relu")
        self.down = Linear(weights, prefix + "down.", dtype)

    def forward(
        self, x: torch.Tensor, delta: torch.Tensor | None, attention: str, biases: torch.Tensor, pack: Pack
    ) -> torch.Tensor:
        qkv = self.qkv(self.attention_norm.pre(x, delta)).view(-1, 3, self.num_heads, self.head_dim)
        attended = attend(attention, qkv, biases, pack)
        del qkv  # four times as wide as the residual stream, each third
        pieces = self.ffn_norm.pre(x, self.out(attended)).split(feed_forward_tokens(len(x), x.device, self.widest))
        return self._feed_forward(pieces[0]) if len(pieces) == 1 else torch.cat([*map(self._feed_forward, pieces)])

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


def parameter_shapes(architecture: T5Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its canonical name."""
    d, ffn, inner = architecture.hidden_dim, architecture.ffn_dim, architecture.inner_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (architecture.vocabulary, d),
        "relative_bias.weight": (architecture.buckets, architecture.num_heads),
    }
    for layer in range(architecture.num_layers):
        prefix = f"layers.{layer}."
        for name, shape in {"qkv": (3 * inner, d), "out": (d, inner), "up": (ffn, d), "down": (d, ffn)}.items():
            shapes[f"{prefix}{name}.weight"] = shape
        for name in ("attention_norm", "ffn_norm"):
            shapes[f"{prefix}{name}.weight"] = (d,)
    shapes["final_norm.weight"] = (d,)
    return shapes
