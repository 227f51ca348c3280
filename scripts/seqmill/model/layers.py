"""The layers that all architectures are made of: a linear layer, and a layer norm with the addition before it."""

import platform
from typing import Literal

import torch
import torch.nn.functional as F

from seqmill.model.elementwise import TRITON, post_norm, pre_norm
from seqmill.model.kernels import gemm_triton

Activation = Literal["gelu", "relu"] | None
TORCH = "torch"  # whose matrix products are used; TRITON's have not been measured on a GPU
FFN_CPU_BYTES, FFN_BYTES = 16 << 20, 768 << 20
PACKED_FOR_TOKENS = 2048  # a hint for oneDNN: the tokens of most calls, `embedding.runner.CPU_PIECE_TOKENS`


class Linear(torch.nn.Module):
    """A matrix product in `dtype`, with a bias if the weights have one, and the exact (erf) GELU or ReLU if asked for.

    On a CPU one call of oneDNN does all three. `F.linear` first copies the bias into the result, and in float32 its
    bits depend on the number of tokens if there are fewer than four. On CUDA in 16 bits, `products` can be TRITON:
    bias and GELU are then part of the product, see `gemm_triton`.
    """

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        prefix: str,
        dtype: torch.dtype,
        activation: Activation = None,
        products: str = TORCH,
    ) -> None:
        super().__init__()
        self.weight = parameter(weights[prefix + "weight"], dtype)
        bias = weights.get(prefix + "bias")
        self.bias = None if bias is None else parameter(bias, dtype)
        self.activation, self.products = activation, products
        self.uses_onednn = products == TORCH and _onednn_supports(dtype)

    def pack(self) -> None:
        """Arrange the weights for oneDNN once, not in every call; for a CPU. The products keep their bits."""
        if self.uses_onednn:
            packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), PACKED_FOR_TOKENS)
            del self.weight  # a parameter can't be of this layout
            self.weight = packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.products == TRITON:
            return gemm_triton.linear(x, self.weight, self.bias, self.activation == "gelu")
        if self.uses_onednn and x.is_cpu:
            after: tuple[str, list[float], str]
            after = self.activation or "none", [], "none" if self.activation == "gelu" else ""
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *after)
        y = F.linear(x, self.weight, self.bias)
        if self.activation == "relu":
            return y.relu_()
        return F.gelu(y) if self.activation == "gelu" else y


def _onednn_supports(dtype: torch.dtype) -> bool:
    # These operations of torch's compiler were tried on x86 only.
    operations = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    if platform.machine() != "x86_64" or not all(hasattr(torch.ops.mkldnn, name) for name in operations):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Norm(torch.nn.Module):
    """Adds a step's result to the residual stream, normalizes, and rounds to the next step's dtype.

    Args:
        weights, prefix: tensors by name, and the beginning of this layer's names.
        eps: added to the variance.
        exact: dtype of the residual stream, the weight and the bias.
        dtype: of the rounded result.
        elementwise: the kernel, a name from `seqmill.model.elementwise.choose_elementwise`.
        centered: False for an RMS norm; only `pre` has it.
    """

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        prefix: str,
        eps: float,
        exact: torch.dtype,
        dtype: torch.dtype,
        elementwise: str,
        centered: bool = True,
    ) -> None:
        super().__init__()
        self.weight = parameter(weights[prefix + "weight"], exact)
        bias = weights.get(prefix + "bias")
        self.bias = None if bias is None else parameter(bias, exact)
        self.eps, self.dtype, self.elementwise, self.centered = eps, dtype, elementwise, centered

    def pre(self, x: torch.Tensor, delta: torch.Tensor | None) -> torch.Tensor:
        """Add delta to x in place; return the layer norm of x in `dtype`."""
        return pre_norm(self.elementwise, x, delta, self.weight, self.bias, self.eps, self.dtype, self.centered)

    def post(self, x: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the layer norm of x + delta, and the same in `dtype`; x may change."""
        return post_norm(self.elementwise, x, delta, self.weight, self.bias, self.eps, self.dtype)


def parameter(tensor: torch.Tensor, dtype: torch.dtype) -> torch.nn.Parameter:
    """Return a parameter that is not trained."""
    return torch.nn.Parameter(tensor.to(dtype), requires_grad=False)


def feed_forward_tokens(num_tokens: int, device: torch.device, token_bytes: int) -> int:
    """Return how many of the tokens a feed-forward call gets, if its widest activation takes `token_bytes` for each.

    Gated and T5's feed-forwards are up to sixteen times as wide as the residual stream, and a sequence may have
    50,000 tokens. On a CPU, activations of up to FFN_CPU_BYTES stay in the cache, and the allocator keeps their memory;
    calls are about equal, since a product of one token has other bits. A GPU gets a whole pack if that fits FFN_BYTES:
    each call is 3 launches, and products of more rows are faster.
    """
    if device.type == "cuda":
        return max(FFN_BYTES // token_bytes, 1)
    calls = -(-num_tokens * token_bytes // FFN_CPU_BYTES)
    return -(-num_tokens // calls)
