"""DNABERT-S, as a plain forward over packs.

The reference is the model's published code (MAGICS-LAB/DNABERT_S, `evaluate/model_codes/bert_layers.py`, its PyTorch
path), run in float32: Zhou et al. 2024, arXiv:2402.08777. The architecture is that of DNABERT-2 (Zhou et al. 2023,
arXiv:2306.15006) and MosaicBERT (Portes et al. 2023, arXiv:2312.17482): ALiBi for positions, a gated feed-forward, a
layer norm after each step. Here there is no padding and no pooler; each norm first adds the previous step's result, so
that both are one pass over memory with our kernels.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from seqmill.model import float8
from seqmill.model.alibi import attend, make_biases
from seqmill.model.elementwise import EAGER, gate
from seqmill.model.float8 import FLOAT8, Activations, activations_dtype, make_linear, make_norm
from seqmill.model.layers import feed_forward_tokens, parameter
from seqmill.model.pack import Pack
from seqmill.spec.architectures import DnabertArchitecture

LAYER_NORM_EPS = 1e-12


class DnabertS(torch.nn.Module):
    """The encoder of DNABERT-S.

    Matrix products run in `dtype`; the residual stream, layer norms and attention biases stay in float32
    (float64 if that is the dtype).

    The arguments are those of `esm2.ESM2`; `attention` is a name from `seqmill.model.alibi.choose_kernel`.
    """

    biases: torch.Tensor

    def __init__(
        self,
        architecture: DnabertArchitecture,
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
        # Every token has type 0, so the two embeddings are one table.
        self.embed = parameter(weights["embed.weight"].to(exact) + weights["token_type.weight"][0].to(exact), exact)
        self.embed_norm = make_norm(weights, "embed_norm.", LAYER_NORM_EPS, exact, dtype, elementwise)
        self.layers = torch.nn.ModuleList(
            Layer(architecture, weights, f"layers.{layer}.", dtype, exact, elementwise)
            for layer in range(architecture.num_layers)
        )
        self.max_tokens = max_tokens
        biases = make_biases(attention, architecture.num_heads, max_tokens, exact)
        self.register_buffer("biases", biases, persistent=False)

    def reserve(self, max_tokens: int) -> None:
        """Make the table of biases long enough for a segment of `max_tokens` tokens."""
        if max_tokens > self.max_tokens:
            biases = make_biases(self.attention, self.architecture.num_heads, max_tokens, self.biases.dtype)
            self.biases = biases.to(self.biases.device)
            self.max_tokens = max_tokens  # last: an interrupted call is repeated

    @torch.inference_mode()
    def forward(self, pack: Pack) -> torch.Tensor:
        """Return the hidden states after the last layer, (num_tokens, hidden_dim).

        float32, or float64 for a float64 model.
        """
        ((_, hidden),) = self.hidden_states(pack, (len(self.layers),))
        return hidden

    def hidden_states(self, pack: Pack, layers: tuple[int, ...]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield some layers' numbers and hidden states, in ascending order; the next one may overwrite them.

        0 is the embedding of the tokens after its layer norm, k the output of block k.
        """
        x, rounded = self.embed_norm.post(F.embedding(pack.tokens.int(), self.embed), None)
        if 0 in layers:
            yield 0, x
        for number, layer in enumerate(self.layers[: max(layers)], start=1):
            x, rounded = layer(x, rounded, self.attention, self.biases, pack)
            if number in layers:
                yield number, x


class Layer(torch.nn.Module):
    """A post-norm transformer block; takes and returns the residual stream, exact and rounded."""

    def __init__(
        self,
        architecture: DnabertArchitecture,
        weights: dict[str, torch.Tensor],
        prefix: str,
        dtype: torch.dtype,
        exact: torch.dtype,
        elementwise: str,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = architecture.num_heads, architecture.head_dim
        self.elementwise = elementwise
        self.widest = 2 * architecture.ffn_dim * activations_dtype(dtype).itemsize  # bytes of a token, both halves
        self.qkv = make_linear(weights, prefix + "qkv.", dtype, elementwise)
        self.out = make_linear(weights, prefix + "out.", dtype, elementwise)
        self.attention_norm = make_norm(weights, prefix + "attention_norm.", LAYER_NORM_EPS, exact, dtype, elementwise)
        self.gated = make_linear(weights, prefix + "gated.", dtype, elementwise)
        self.gate = float8.gate if dtype == FLOAT8 else gate
        self.down = make_linear(weights, prefix + "down.", dtype, elementwise)
        self.ffn_norm = make_norm(weights, prefix + "ffn_norm.", LAYER_NORM_EPS, exact, dtype, elementwise)

    def forward(
        self, x: torch.Tensor, rounded: Activations, attention: str, biases: torch.Tensor, pack: Pack
    ) -> tuple[torch.Tensor, Activations]:
        qkv = self.qkv(rounded).view(-1, 3, self.num_heads, self.head_dim)
        attended = attend(attention, qkv, biases, pack)
        del qkv  # the largest tensor of a long sequence
        x, rounded = self.attention_norm.post(x, self.out(attended))
        pieces = rounded.split(feed_forward_tokens(len(x), x.device, self.widest))
        delta = self._feed_forward(rounded) if len(pieces) == 1 else torch.cat([*map(self._feed_forward, pieces)])
        return self.ffn_norm.post(x, delta)

    def _feed_forward(self, x: Activations) -> torch.Tensor:
        return self.down(self.gate(self.elementwise, self.gated(x)))


def parameter_shapes(architecture: DnabertArchitecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its canonical name."""
    d, ffn = architecture.hidden_dim, architecture.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (architecture.vocabulary, d),
        "token_type.weight": (architecture.token_types, d),
        "embed_norm.weight": (d,),
        "embed_norm.bias": (d,),
    }
    for layer in range(architecture.num_layers):
        prefix = f"layers.{layer}."
        shapes[f"{prefix}gated.weight"] = (2 * ffn, d)
        for name, (rows, columns) in {"qkv": (3 * d, d), "out": (d, d), "down": (d, ffn)}.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            shapes[f"{prefix}{name}.bias"] = (rows,)
        for name in ("attention_norm", "ffn_norm"):
            shapes[f"{prefix}{name}.weight"] = shapes[f"{prefix}{name}.bias"] = (d,)
    return shapes
