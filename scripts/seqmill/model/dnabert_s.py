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
from seqmill.model.layers import parameter
from seqmill.model.pack import Pack
from seqmill.spec.models import DnabertArchitecture

LAYER_NORM_EPS = 1e-12
# Tokens per feed-forward call on a CPU: it is eight times as wide as the residual stream, and a contig may have 20,000
# tokens. A GPU gets a whole pack, if its widest activation (both halves of the gate) takes at most FFN_BYTES: 65,536
# tokens in 16 bits, 32,768 in float32. Each call is 3 launches, and products of more rows are faster.
FFN_TOKENS = 4096
FFN_BYTES = 768 << 20


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
        self.ffn_dim, self.activations = architecture.ffn_dim, activations_dtype(dtype)
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
        pieces = rounded.split(ffn_tokens(x.device, self.activations, self.ffn_dim))
        delta = self._feed_forward(rounded) if len(pieces) == 1 else torch.cat([*map(self._feed_forward, pieces)])
        return self.ffn_norm.post(x, delta)

    def _feed_forward(self, x: Activations) -> torch.Tensor:
        return self.down(self.gate(self.elementwise, self.gated(x)))


def ffn_tokens(device: torch.device, dtype: torch.dtype, ffn_dim: int) -> int:
    """Return how many tokens one feed-forward call gets at most, on a device and with activations in `dtype`."""
    return max(FFN_BYTES // (2 * ffn_dim * dtype.itemsize), 1) if device.type == "cuda" else FFN_TOKENS


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
