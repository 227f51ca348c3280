"""The layers that both architectures are made of: a linear layer, and a layer norm with the addition before it."""

import torch
import torch.nn.functional as F

from seqmill.model.kernels import fused


class Linear(torch.nn.Module):
    """A matrix product in `dtype`, with a bias if the weights have one."""

    def __init__(self, weights: dict[str, torch.Tensor], prefix: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(weights[prefix + "weight"], dtype)
        bias = weights.get(prefix + "bias")
        self.bias = None if bias is None else parameter(bias, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Norm(torch.nn.Module):
    """Adds a step's result to the residual stream, normalizes, and rounds to the next step's dtype.

    Args:
        weights, prefix: tensors by name, and the beginning of this layer's names.
        eps: added to the variance.
        exact: dtype of the residual stream, the weight and the bias.
        dtype: of the rounded result.
        fuse: use Triton's kernels, one pass over memory; see `seqmill.model.kernels.fused`.
    """

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        prefix: str,
        eps: float,
        exact: torch.dtype,
        dtype: torch.dtype,
        fuse: bool,
    ) -> None:
        super().__init__()
        self.weight = parameter(weights[prefix + "weight"], exact)
        self.bias = parameter(weights[prefix + "bias"], exact)
        self.eps, self.dtype, self.fuse = eps, dtype, fuse

    def pre(self, x: torch.Tensor, delta: torch.Tensor | None) -> torch.Tensor:
        """Add delta to x in place; return the layer norm of x in `dtype`."""
        if self.fuse:
            return fused.add_norm(x, delta, self.weight, self.bias, self.eps, self.dtype)
        if delta is not None:
            x += delta
        return self._normalized(x).to(self.dtype)

    def post(self, x: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the layer norm of x + delta, and the same in `dtype`; x may change."""
        if self.fuse:
            return x, fused.add_norm(x, delta, self.weight, self.bias, self.eps, self.dtype, post=True)
        x = self._normalized(x if delta is None else x + delta)
        return x, x.to(self.dtype)

    def _normalized(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def parameter(tensor: torch.Tensor, dtype: torch.dtype) -> torch.nn.Parameter:
    """Return a parameter that is not trained."""
    return torch.nn.Parameter(tensor.to(dtype), requires_grad=False)
