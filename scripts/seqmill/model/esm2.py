"""ESM-2, as a plain forward over packs.

The reference is fair-esm 2.0.0 (`esm/model/esm2.py`, `esm/modules.py`, `esm/rotary_embedding.py`),
run in float32: Lin et al. 2023, doi:10.1126/science.ade2574. Here there is no padding, one GEMM for
query, key and value, and no language-model head; each norm first adds the previous step's result to the
residual stream, so that both are one pass over memory with our kernels.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from seqmill.model.attention import attend, attend_rotated
from seqmill.model.elementwise import EAGER, TRITON
from seqmill.model.float8 import make_linear, make_norm
from seqmill.model.kernels import gemm_triton
from seqmill.model.layers import TORCH, Norm, parameter
from seqmill.model.pack import Pack
from seqmill.spec.architectures import Esm2Architecture

LAYER_NORM_EPS = 1e-5
ROPE_BASE = 10000.0
# ESM-2 was trained with 15 % of tokens selected, of which 80 % were masked to zero; without masks the reference
# scales the embeddings by the average share that was left.
TOKEN_DROPOUT_SCALE = 1 - 0.15 * 0.8


class ESM2(torch.nn.Module):
    """The encoder of ESM-2.

    Matrix products run in `dtype`; the residual stream, layer norms and rotary tables stay in float32
    (float64 if that is the dtype).

    Args:
        architecture: the model's shape.
        weights: tensors by canonical name, as `parameter_shapes` lists them.
        dtype: torch.float32, torch.bfloat16, torch.float16, torch.float64 or `float8.FLOAT8`.
        max_tokens: tokens in the longest sequence that the model will see, cls and eos included.
        attention: the kernel, a name from `seqmill.model.attention.choose_kernel`.
        elementwise: the kernel of the steps between, a name from `seqmill.model.elementwise.choose_elementwise`.
        products: TORCH; or TRITON, on CUDA in 16 bits: the rotation and the GELU are part of the products before them.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        architecture: Esm2Architecture,
        weights: dict[str, torch.Tensor],
        dtype: torch.dtype,
        max_tokens: int,
        attention: str = "sdpa",
        elementwise: str = EAGER,
        products: str = TORCH,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.attention = attention
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        self.elementwise = elementwise
        self.embed = parameter(weights["embed.weight"], exact)
        self.layers = torch.nn.ModuleList(
            Layer(architecture, weights, f"layers.{layer}.", dtype, exact, elementwise, products)
            for layer in range(architecture.num_layers)
        )
        self.final_norm = Norm(weights, "final_norm.", LAYER_NORM_EPS, exact, exact, elementwise)
        cos, sin = rope_tables(max_tokens, architecture.head_dim, exact)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def reserve(self, max_tokens: int) -> None:
        """Make the tables of positions long enough for a segment of `max_tokens` tokens."""
        if max_tokens > len(self.cos):
            tables = rope_tables(max_tokens, self.architecture.head_dim, self.cos.dtype)
            cos, sin = (table.to(self.cos.device) for table in tables)
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

        0 is the embedding of the tokens, k the output of block k, the last after the final layer norm, as in fair-esm.
        """
        x = F.embedding(pack.tokens.int(), self.embed)
        if self.architecture.token_dropout:
            x *= TOKEN_DROPOUT_SCALE
        delta = None
        for number, layer in enumerate(self.layers):
            if number in layers:
                yield number, x if delta is None else x + delta
            if number >= max(layers):
                return
            delta = layer(x, delta, self.attention, self.cos, self.sin, pack)
        yield len(self.layers), self.final_norm.pre(x, delta)


class Layer(torch.nn.Module):
    """A pre-norm transformer block; takes the residual stream and the delta to add to it, returns the next delta."""

    def __init__(
        self,
        architecture: Esm2Architecture,
        weights: dict[str, torch.Tensor],
        prefix: str,
        dtype: torch.dtype,
        exact: torch.dtype,
        elementwise: str,
        products: str,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = architecture.num_heads, architecture.head_dim
        self.elementwise, self.products = elementwise, products
        self.attention_norm = make_norm(weights, prefix + "attention_norm.", LAYER_NORM_EPS, exact, dtype, elementwise)
        self.qkv = make_linear(weights, prefix + "qkv.", dtype, elementwise, products=products)
        self.out = make_linear(weights, prefix + "out.", dtype, elementwise)
        self.ffn_norm = make_norm(weights, prefix + "ffn_norm.", LAYER_NORM_EPS, exact, dtype, elementwise)
        self.fc1 = make_linear(weights, prefix + "fc1.", dtype, elementwise, activation="gelu", products=products)
        self.fc2 = make_linear(weights, prefix + "fc2.", dtype, elementwise)

    def forward(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        attention: str,
        cos: torch.Tensor,
        sin: torch.Tensor,
        pack: Pack,
    ) -> torch.Tensor:
        rounded = self.attention_norm.pre(x, delta)
        if self.products == TRITON:
            assert isinstance(rounded, torch.Tensor)  # 16-bit, see `gemm_triton.why_not`
            weight, bias = self.qkv.weight, self.qkv.bias
            qkv = gemm_triton.rotated_qkv(rounded, weight, bias, cos, sin, pack.positions, self.head_dim)
            attended = attend_rotated(attention, qkv, pack)
        else:
            qkv = self.qkv(rounded).view(-1, 3, self.num_heads, self.head_dim)
            attended = attend(attention, qkv, cos, sin, pack, self.elementwise == TRITON)
        delta = self.out(attended)
        return self.fc2(self.fc1(self.ffn_norm.pre(x, delta)))


def rope_tables(num_positions: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines (num_positions, head_dim) of the rotary position embedding.

    As in fair-esm, the inverse frequencies are always computed in float32 on the CPU: in bfloat16 the angles would be
    off by 0.27 rad at position 160, and frequencies from another device or in float64 visibly change the output.
    """
    inverse_frequencies = 1.0 / (ROPE_BASE ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim))
    positions = torch.arange(num_positions, device="cpu").to(dtype)
    angles = torch.outer(positions, inverse_frequencies.to(dtype)).repeat(1, 2)
    return angles.cos(), angles.sin()


def parameter_shapes(architecture: Esm2Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its canonical name."""
    d, ffn = architecture.hidden_dim, architecture.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (architecture.vocabulary, d)}
    for layer in range(architecture.num_layers):
        prefix = f"layers.{layer}."
        for name, (rows, columns) in {"qkv": (3 * d, d), "out": (d, d), "fc1": (ffn, d), "fc2": (d, ffn)}.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            shapes[f"{prefix}{name}.bias"] = (rows,)
        for name in ("attention_norm", "ffn_norm"):
            shapes[f"{prefix}{name}.weight"] = shapes[f"{prefix}{name}.bias"] = (d,)
    shapes["final_norm.weight"] = shapes["final_norm.bias"] = (d,)
    return shapes
