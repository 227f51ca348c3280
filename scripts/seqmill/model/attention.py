"""Attention over a pack, behind one function with interchangeable kernels.

| kernel | where | how |
|---|---|---|
| amx, avx512_bf16 | CPU, bfloat16, by the processor's instructions | our own, with the rotation fused: `kernels.cpu` |
| avx512, avx2, neon | CPU, float32, likewise | the same |
| flash_attn_3 | CUDA of compute capability 9.0, 16-bit | `flash_attn_interface` from flash-attention's folder hopper |
| varlen | CUDA of compute capability 8.0 and later, 16-bit | PyTorch's FlashAttention 2: `seqmill.model.varlen` |
| flash_attn_2 | the same | `flash_attn`, the package of FlashAttention 2 |
| sdpa | everywhere | PyTorch's, over runs of sequences of equal length, without padding or mask |

`choose_kernel` returns the requested kernel, or the first that the device, the dtype and the installation allow.
`fastest_first` says where FlashAttention 3 is not the first choice.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from seqmill.errors import SeqmillError
from seqmill.model import varlen
from seqmill.model.kernels import compiled, cpu, fused
from seqmill.model.pack import Pack
from seqmill.spec.task import ATTENTIONS, AUTO

# Weights (num_heads * head_dim,) of the layer norms of queries and of keys, and what is added to the variance.
QKNorms = tuple[torch.Tensor, torch.Tensor, float]

FASTEST_FIRST = (*compiled.KERNELS, "flash_attn_3", "varlen", "flash_attn_2", "sdpa")
# Functions over packs, all called with (q, k, v, cu_seqlens, cu_seqlens, longest, longest).
PACKED = {
    "varlen": ("torch.nn.attention.varlen", "varlen_attn"),
    "flash_attn_2": ("flash_attn", "flash_attn_varlen_func"),
    "flash_attn_3": ("flash_attn_interface", "flash_attn_varlen_func"),
}
MAX_PACKED_HEAD_DIM = 256  # for all three; head dimensions must be multiples of 8
FLASH_ATTN_3_HEAD_DIM = 64  # from which `auto` prefers FlashAttention 3; nothing is measured


def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, requested: str = AUTO) -> str:
    """Return the requested kernel's name, or for `auto` that of the fastest usable one.

    Raise a SeqmillError if there is no such kernel, or it can't be used; the message says why.
    """
    return choose(requested, fastest_first(dtype, head_dim), lambda name: why_not(name, device, dtype, head_dim))


def fastest_first(dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """Return FASTEST_FIRST, with FlashAttention 3 before sdpa only where it is not known to be better.

    It computes smaller head dimensions as 64, twice to four times the work; FlashAttention 2 has 32. Its last block of
    values reaches into the next sequence, with weights of 0 (flash-attention issue 2374): an overflow in float16, NaN
    or inf, would spoil the sequence before it, too, which would be computed again in float32 for nothing.
    """
    if dtype != torch.float16 and head_dim >= FLASH_ATTN_3_HEAD_DIM:
        return FASTEST_FIRST
    others = [name for name in FASTEST_FIRST if name not in ("flash_attn_3", "sdpa")]
    return (*others, "flash_attn_3", "sdpa")


def choose(requested: str, fastest_first: tuple[str, ...], reason_against: Callable[[str], str]) -> str:
    """Return the requested kernel, or for `auto` the first without a reason against it; raises as `choose_kernel`."""
    if requested not in ATTENTIONS:
        raise SeqmillError(f"attention {requested!r} is not known; use one of {', '.join(ATTENTIONS)}")
    if requested == AUTO:
        return next(name for name in fastest_first if not reason_against(name))
    if reason := reason_against(requested):
        raise SeqmillError(f"attention {requested} can't be used: {reason}; use attention auto or another kernel")
    return requested


def why_not(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return why a kernel can't be used; empty if it can."""
    if kernel == "sdpa":
        return ""
    if kernel not in FASTEST_FIRST:
        return "it adds biases to the scores, and this model rotates queries and keys"
    kind = str(dtype).removeprefix("torch.")
    if kernel in compiled.KERNELS:
        if device.type != "cpu":
            return f"it runs on a CPU, and the device is {device.type}"
        if kind != (own := compiled.KERNELS[kernel].precision):
            return f"it computes in {own}, and the precision is {kind}"
        if head_dim not in cpu.HEAD_DIMS:
            return f"it has head dimensions {', '.join(map(str, cpu.HEAD_DIMS))}, and the model's is {head_dim}"
        return compiled.why_not(kernel)
    if device.type != "cuda":
        return f"it runs on a CUDA device, and the device is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, and the precision is {kind}"
    if head_dim % 8 or head_dim > MAX_PACKED_HEAD_DIM:
        return (
            f"it takes head dimensions that are multiples of 8 up to {MAX_PACKED_HEAD_DIM}; the model's is {head_dim}"
        )
    capability = torch.cuda.get_device_capability(device)
    if kernel == "flash_attn_3" and capability != (9, 0):
        return f"it needs compute capability 9.0 (H100, H200), and the GPU has {capability[0]}.{capability[1]}"
    if capability < (8, 0):
        return f"it needs compute capability 8.0, and the GPU has {capability[0]}.{capability[1]}"
    try:
        _packed_function(kernel)
    except ImportError as error:
        return f"{PACKED[kernel][0]} can't be imported ({error})"
    return ""


def attend(
    kernel: str,
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pack: Pack,
    fuse: bool = False,
    norms: QKNorms | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, then let each sequence attend to itself, with scores scaled by head_dim ** -0.5.

    Args:
        kernel: a name from `choose_kernel`.
        qkv: (num_tokens, 3, num_heads, head_dim), contiguous.
        cos, sin: (at least the longest length, head_dim), float32 or float64; see `esm2.rope_tables`.
        pack: the boundaries of the sequences.
        fuse: rotate in place with Triton; see `fused.available`.
        norms: ESM C's layer norms of queries and keys, before the rotation and over all heads.

    Returns:
        (num_tokens, num_heads * head_dim), in the dtype of `qkv`.
    """
    if kernel in compiled.KERNELS:
        return cpu.rope_attention(kernel, qkv, cos, sin, pack.lengths, norms)
    if fuse:
        fused.rotate(qkv, cos, sin, pack.positions, norms)  # shows overflow as well
        q, k, v = qkv.unbind(1)
    else:
        qk = normalize(qkv[:, :2], cos.dtype, norms) if norms else qkv[:, :2]
        q, k = rotate(qk, cos[pack.positions], sin[pack.positions]).to(qkv.dtype).unbind(1)
        v = show_overflow(q, k, qkv[:, 2])
    return _attend(kernel, q, k, v, pack)


def attend_rotated(kernel: str, qkv: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Attend as `attend` does, on a GPU, to queries and keys that are rotated already."""
    q, k, v = qkv.unbind(1)
    return _attend(kernel, q, k, show_overflow(q, k, v), pack)


def _attend(kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack) -> torch.Tensor:
    if kernel == "sdpa":
        return by_runs(q, k, v, pack, lambda q, k, v, output: output.copy_(F.scaled_dot_product_attention(q, k, v)))
    return packed(kernel, q, k, v, pack)


def show_overflow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the values, made NaN for tokens whose query or key overflowed in float16 (0 x inf is NaN).

    Otherwise an infinite query or key can become weights of zero, which are finite and wrong.
    """
    return v + 0 * q + 0 * k if v.dtype == torch.float16 else v


def normalize(qk: torch.Tensor, dtype: torch.dtype, norms: QKNorms) -> torch.Tensor:
    """Return the layer norms, without bias, of queries and of keys, each over all heads of a token.

    `qk` is (num_tokens, 2, num_heads, head_dim), as is the result, in `dtype`.
    """
    *weights, eps = norms
    width = (qk.shape[2] * qk.shape[3],)
    parts = zip(qk.to(dtype).unbind(1), weights, strict=True)
    normal = [F.layer_norm(part.flatten(1), width, weight, None, eps) for part, weight in parts]
    return torch.stack(normal, dim=1).view(qk.shape)


def rotate(qk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the rotary position embedding (Su et al. 2021, arXiv:2104.09864) by halves of the head dimension.

    `qk` is (num_tokens, 2, num_heads, head_dim); `cos` and `sin` are (num_tokens, head_dim), float32 or float64. The
    result has their dtype.
    """
    first, second = qk.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return qk * cos[:, None, None] + rotated * sin[:, None, None]


def by_runs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack, attend_run: Callable[..., object]
) -> torch.Tensor:
    """Attend by runs of equally long sequences: (num_tokens, num_heads * head_dim).

    `attend_run` gets views of q, k, v and the output, each (sequences, num_heads, length, head_dim), and fills it.
    """
    num_tokens, num_heads, head_dim = v.shape
    output = torch.empty((num_tokens, num_heads, head_dim), dtype=v.dtype, device=v.device)
    for start, count, length in pack.runs:
        run = slice(start, start + count * length)
        attend_run(*(t[run].view(count, length, num_heads, head_dim).transpose(1, 2) for t in (q, k, v, output)))
    return output.view(num_tokens, num_heads * head_dim)


def packed(
    kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack, **biases: torch.Tensor
) -> torch.Tensor:
    """Call a PACKED kernel on q, k and v (num_tokens, num_heads, head_dim), with its own argument for biases if any.

    Return (num_tokens, num_heads * head_dim).
    """
    function, scale_name, supported = _packed_function(kernel)
    longest = int(pack.lengths.max())
    scale = {scale_name: q.shape[-1] ** -0.5} if scale_name else {}
    options: dict[str, Any] = {**scale, **supported, **biases}
    output = function(q, k, v, pack.cu_seqlens, pack.cu_seqlens, longest, longest, **options)
    if isinstance(output, tuple):  # early versions of flash_attn_interface add the log-sum-exp
        output = output[0]
    return output.flatten(1)


@functools.cache
def _packed_function(kernel: str) -> tuple[Callable[..., Any], str, dict[str, int]]:
    """Return the function, the name of its scale argument, and options that its version supports.

    Without a name the scale is head_dim ** -0.5. With num_splits=1 the pack's longest sequence does not determine how
    keys are divided among thread blocks, so a sequence has the same bits in any pack. Raise an ImportError if it isn't
    installed for this version of torch.
    """
    if kernel == "varlen" and (found := varlen.find_operation()):
        function, options = found
        return function, "scale", options
    parameters = inspect.signature(function := _imported(kernel)).parameters
    scale = next((name for name in ("scale", "softmax_scale") if name in parameters), "")
    return function, scale, {"num_splits": 1} if "num_splits" in parameters else {}


def takes_biases(kernel: str) -> bool:
    """Return whether a PACKED kernel has linear biases; raise an ImportError if it isn't installed."""
    return "alibi_slopes" in inspect.signature(_imported(kernel)).parameters


def _imported(kernel: str) -> Callable[..., Any]:
    module, name = PACKED[kernel]
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise ImportError(str(error)) from error
