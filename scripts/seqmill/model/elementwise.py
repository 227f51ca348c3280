"""The elementwise steps between matrix products, behind functions with interchangeable kernels.

| kernel | where | how |
|---|---|---|
| eager | everywhere | PyTorch's operations, one after another |
| triton | CUDA | one pass over memory: `kernels.fused` |
| amx, avx512_bf16, avx512, avx2, neon | CPU, in the kernel's dtype | one pass over memory: `kernels.cpu` |
"""

import torch
import torch.nn.functional as F

from seqmill.model.kernels import compiled, cpu, fused

EAGER, TRITON = "eager", "triton"


def choose_elementwise(device: torch.device, dtype: torch.dtype, dims: tuple[int, ...]) -> str:
    """Return the fastest kernel for activations of these widths, on a device and next to matrix products in `dtype`."""
    if dtype == torch.float64:
        return EAGER
    if device.type == "cuda":
        return TRITON if fused.available(device) else EAGER
    if dtype == torch.float8_e4m3fn or any(dim % cpu.LANES for dim in dims):
        return EAGER
    return compiled.of_dtype(dtype) or EAGER


def pre_norm(
    kernel: str,
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
    centered: bool = True,
) -> torch.Tensor:
    """Add delta to x in place; return the layer norm of x in `dtype`.

    Args:
        kernel: a name from `choose_elementwise`.
        x: (num_tokens, hidden_dim), the residual stream, contiguous. If `dtype` is wider than that of the matrix
            products, as after the last layer, x may become the result.
        delta: the same shape, any floating dtype; None adds nothing.
        weight, bias: (hidden_dim,), in the dtype of x; None adds no bias.
        eps: added to the variance.
        dtype: of the result.
        centered: subtract the mean first; without it this is the RMS norm (Zhang & Sennrich 2019, arXiv:1910.07467).
    """
    if kernel == TRITON:
        return fused.add_norm(x, delta, weight, bias, eps, dtype, centered=centered)
    if kernel == EAGER:
        if delta is not None:
            x += delta
        if centered:
            return F.layer_norm(x, weight.shape, weight, bias, eps).to(dtype)
        return F.rms_norm(x, weight.shape, weight, eps).to(dtype)
    return cpu.add_norm(kernel, x, delta, weight, bias, eps, dtype, centered=centered)


def post_norm(
    kernel: str,
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the layer norm of x + delta, and the same in `dtype`; x may change. The arguments are `pre_norm`'s."""
    if kernel == TRITON:
        return x, fused.add_norm(x, delta, weight, bias, eps, dtype, post=True)
    if kernel == EAGER:
        x = F.layer_norm(x if delta is None else x + delta, weight.shape, weight, bias, eps)
        return x, x.to(dtype)
    return x, cpu.add_norm(kernel, x, delta, weight, bias, eps, dtype, post=True)


def gate(kernel: str, h: torch.Tensor, silu: bool = False) -> torch.Tensor:
    """Return the exact (erf) GELU, or SiLU, of the first half of each row of h times the second half."""
    if kernel == TRITON:
        return fused.gate(h, silu)
    if kernel == EAGER:
        first, second = h.chunk(2, dim=-1)
        return (F.silu(first) if silu else F.gelu(first)).mul_(second)
    return cpu.gate(kernel, h, silu)
