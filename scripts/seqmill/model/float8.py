"""Matrix products in float8 (e4m3: 3 bits of mantissa, at most 448; Micikevicius et al. 2022, arXiv:2209.05433).

A weight has one scale for each output channel, an activation one for each token, computed from its row: the largest
magnitude of every row becomes 448. The products are summed in float32, scaled, and rounded to bfloat16. On CUDA the
steps between products round and scale in the same pass over memory (`kernels.float8_triton`); everywhere else PyTorch's
operations do, and on a CPU the products are emulated, for tests and for a sequence that does not fit the GPU.

e4m3 has no infinity, and conversions to it may saturate: an overflow would become 448. So a row with a value that is
not finite gets the scale NaN, and all its products are NaN.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from seqmill.model.elementwise import TRITON
from seqmill.model.kernels import float8_triton
from seqmill.model.layers import TORCH, Activation, Linear, Norm, parameter

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
SMALLEST = 2.0**-100  # the least magnitude by which a row is divided, for rows of zeros
MULTIPLE = 16  # `_scaled_mm` takes matrices whose sides are multiples of it


class Scaled(NamedTuple):
    """Rows in float8 with their scales: row i is `values[i] * scales[i]`."""

    values: torch.Tensor  # float8_e4m3fn (rows, width)
    scales: torch.Tensor  # float32 (rows, 1)

    def split(self, rows: int) -> list["Scaled"]:
        """Return blocks of at most `rows` rows."""
        return [Scaled(*block) for block in zip(self.values.split(rows), self.scales.split(rows), strict=True)]


Activations = torch.Tensor | Scaled


def round_rows(x: torch.Tensor) -> Scaled:
    """Round each row of x (rows, width), any floating dtype; the eager form of `float8_triton`'s kernels."""
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True)  # NaN if one is
    largest = torch.where(largest < torch.inf, largest.clamp_min(SMALLEST), torch.nan)
    inverse = torch.full_like(largest, LARGEST) / largest  # PyTorch rounds number / tensor twice
    return Scaled((x * inverse).to(FLOAT8), largest / LARGEST)


def product(x: Scaled, weight: Scaled, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x times the transposed weight plus the bias, in bfloat16 (rows of x, rows of weight).

    `weight` has a row for each output channel; `bias` is in bfloat16.
    """
    if x.values.is_cuda:
        # use_fast_accum would keep sums in fewer bits.
        scales = x.scales, weight.scales.t()
        factors = x.values, weight.values.t()
        return torch._scaled_mm(*factors, *scales, bias, out_dtype=torch.bfloat16, use_fast_accum=False)
    y = F.linear(x.values.float(), weight.values.float()) * x.scales * weight.scales.t()
    return (y if bias is None else y + bias).bfloat16()


def gate(kernel: str, h: torch.Tensor) -> Scaled:
    """Return `elementwise.gate` of h, rounded."""
    if kernel == TRITON:
        return Scaled(*float8_triton.round_rows(h, gelu=True, gated=True))
    first, second = h.float().chunk(2, dim=-1)
    return round_rows(F.gelu(first).mul_(second))


class Float8Linear(torch.nn.Module):
    """A matrix product in float8 with a bias if the weights have one.

    Takes rows in bfloat16, or rounded by the step before, and returns bfloat16; with the exact (erf) GELU if asked for,
    and then rounded for the next product.
    """

    def __init__(self, weights: dict[str, torch.Tensor], prefix: str, elementwise: str, gelu: bool) -> None:
        super().__init__()
        weight, bias = round_rows(weights[prefix + "weight"]), weights.get(prefix + "bias")
        self.weight, self.scales = (torch.nn.Parameter(part, requires_grad=False) for part in weight)
        self.bias = None if bias is None else parameter(bias, torch.bfloat16)
        self.elementwise, self.gelu = elementwise, gelu

    def forward(self, x: Activations) -> Activations:
        rows = x if isinstance(x, Scaled) else self._round(x, gelu=False)
        y = product(rows, Scaled(self.weight, self.scales), self.bias)
        return self._round(y, gelu=True) if self.gelu else y

    def _round(self, x: torch.Tensor, gelu: bool) -> Scaled:
        if self.elementwise == TRITON:
            return Scaled(*float8_triton.round_rows(x, gelu=gelu))
        return round_rows(F.gelu(x.float()) if gelu else x)


class Float8Norm(torch.nn.Module):
    """`layers.Norm` with the result rounded to float8 from float32. The arguments are the same."""

    def __init__(
        self, weights: dict[str, torch.Tensor], prefix: str, eps: float, exact: torch.dtype, elementwise: str
    ) -> None:
        super().__init__()
        self.weight = parameter(weights[prefix + "weight"], exact)
        self.bias = parameter(weights[prefix + "bias"], exact)
        self.eps, self.elementwise = eps, elementwise

    def pre(self, x: torch.Tensor, delta: torch.Tensor | None) -> Scaled:
        """Add delta to x in place; return the layer norm of x, rounded."""
        if self.elementwise == TRITON:
            return Scaled(*float8_triton.add_norm(x, delta, self.weight, self.bias, self.eps))
        if delta is not None:
            x += delta
        return round_rows(self._norm(x))

    def post(self, x: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, Scaled]:
        """Return the layer norm of x + delta, and the same rounded; x may change."""
        if self.elementwise == TRITON:
            return x, Scaled(*float8_triton.add_norm(x, delta, self.weight, self.bias, self.eps, post=True))
        x = self._norm(x if delta is None else x + delta)
        return x, round_rows(x)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def make_linear(
    weights: dict[str, torch.Tensor],
    prefix: str,
    dtype: torch.dtype,
    elementwise: str,
    activation: Activation = None,
    products: str = TORCH,
) -> Linear | Float8Linear:
    """Return the linear layer for products in `dtype`; `elementwise` is the kernel of the steps between."""
    if dtype == FLOAT8:
        return Float8Linear(weights, prefix, elementwise, activation == "gelu")
    return Linear(weights, prefix, dtype, activation, products)


def make_norm(
    weights: dict[str, torch.Tensor], prefix: str, eps: float, exact: torch.dtype, dtype: torch.dtype, elementwise: str
) -> Norm | Float8Norm:
    """Return the layer norm before products in `dtype`; the arguments are those of `layers.Norm`."""
    if dtype == FLOAT8:
        return Float8Norm(weights, prefix, eps, exact, elementwise)
    return Norm(weights, prefix, eps, exact, dtype, elementwise)


def activations_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which attention computes, and in which products in `dtype` are returned."""
    return torch.bfloat16 if dtype == FLOAT8 else dtype
