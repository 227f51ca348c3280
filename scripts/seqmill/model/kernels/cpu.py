"""Our C kernels on a CPU: attention over packs, and the elementwise steps around it, each in one pass over memory.

A call computes on the calling thread and lets other threads run. See `compiled.KERNELS` for the kernels by name.
"""

import ctypes
from collections.abc import Callable

import numpy as np
import torch

from seqmill.model.kernels import compiled

LANES = 16  # widths of activations must be multiples
HEAD_DIMS = (16, 24, 32, 64, 128)
STATUS = {1: "not enough memory for the attention's workspace", 2: "no attention kernel for this head dimension"}


def rope_attention(
    kernel: str,
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    lengths: np.ndarray,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, then attend: softmax with scores scaled by head_dim ** -0.5.

    Args:
        kernel: a name from `compiled.KERNELS`; the library must load.
        qkv: (num_tokens, 3, num_heads, head_dim) in the kernel's dtype, contiguous, on the CPU.
        cos, sin: float32 (at least the longest length, head_dim), contiguous; see `esm2.rope_tables`.
        lengths: int64 (num_sequences,), tokens in each sequence.
        norms: weights for queries and for keys, float32 (num_heads * head_dim,), and eps: a layer norm without bias of
            each token's query and of its key, over all heads, before the rotation; rounded once, after it. None: none.

    Returns:
        (num_tokens, num_heads * head_dim) in the kernel's dtype.
    """
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert int(lengths.max()) <= len(cos) == len(sin)
    tables: tuple[object, ...] = (_pointer(cos), _pointer(sin))
    if norms is None:
        return _attention(kernel, "rope_attention", qkv, tables, lengths)
    *weights, eps = norms
    assert all(w.dtype == torch.float32 and w.is_contiguous() and w.shape == (qkv[0, 0].numel(),) for w in weights)
    tables = (*tables, *map(_pointer, weights), ctypes.c_float(eps))
    return _attention(kernel, "normalized_rope_attention", qkv, tables, lengths)


def alibi_attention(kernel: str, qkv: torch.Tensor, slopes: torch.Tensor, lengths: np.ndarray) -> torch.Tensor:
    """Attend with linear biases: softmax of scores scaled by head_dim ** -0.5, less slope x distance.

    Keys whose weights would vanish in float32's rounding are skipped, by a bound from the norms of the sequence's own
    queries and keys.

    Args:
        kernel, qkv, lengths: as for `rope_attention`.
        slopes: float32 (num_heads,), positive; see `alibi.slopes`.

    Returns:
        (num_tokens, num_heads * head_dim) in the kernel's dtype.
    """
    assert slopes.dtype == torch.float32
    assert slopes.shape == qkv.shape[2:3]
    slopes = slopes.contiguous()
    return _attention(kernel, "alibi_attention", qkv, (_pointer(slopes),), lengths)


def relative_attention(kernel: str, qkv: torch.Tensor, biases: torch.Tensor, lengths: np.ndarray) -> torch.Tensor:
    """Attend with biases by relative position: softmax of unscaled scores plus bias (T5).

    Each head's biases are expanded to the sequence's distances, one row, so memory is linear in the length.

    Args:
        kernel, qkv, lengths: as for `rope_attention`.
        biases: float32 (num_heads, 2 * span + 1), contiguous; the bias of key j for query i is
            biases[head, span + clamp(j - i, -span, span)].

    Returns:
        (num_tokens, num_heads * head_dim) in the kernel's dtype.
    """
    assert biases.dtype == torch.float32
    assert biases.is_contiguous()
    assert len(biases) == qkv.shape[2]
    assert biases.shape[1] % 2 == 1
    tables = (_pointer(biases), ctypes.c_int64(biases.shape[1] // 2))
    return _attention(kernel, "relative_attention", qkv, tables, lengths)


def add_norm(
    kernel: str,
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
    post: bool = False,
    centered: bool = True,
) -> torch.Tensor:
    """Add to the residual stream, and return the norm of the sum.

    It is a layer norm (Ba et al. 2016, arXiv:1607.06450) or, if not `centered`, an RMS norm (Zhang & Sennrich 2019,
    arXiv:1910.07467). A row whose squares overflow becomes NaN.

    Args:
        kernel: as for `rope_attention`.
        x: float32 (num_tokens, hidden_dim), contiguous; becomes x + delta, or the norm of that if `post`.
        delta: the same shape in the kernel's dtype, contiguous; None adds nothing.
        weight, bias: float32 (hidden_dim,), contiguous; bias None adds nothing.
        eps: added to the variance, or to the mean square.
        dtype: of the result: the kernel's, or float32, which makes x the result.
        post: keep the unrounded result in x.
        centered: subtract the mean.

    Returns:
        (num_tokens, hidden_dim).
    """
    own = compiled.KERNELS[kernel].dtype
    num_tokens, dim = x.shape
    parameters = [weight] if bias is None else [weight, bias]
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in (x, *parameters))
    assert all(parameter.shape == (dim,) for parameter in parameters)
    assert delta is None or (delta.dtype == own and delta.is_contiguous() and delta.shape == x.shape)
    assert dim % LANES == 0
    in_place = dtype == torch.float32 and (post or own != dtype)
    assert in_place or dtype == own
    y = x if in_place else torch.empty_like(x, dtype=dtype)
    _function(kernel, "add_norm")(
        _pointer(x),
        None if delta is None else _pointer(delta),
        _pointer(weight),
        None if bias is None else _pointer(bias),
        ctypes.c_float(eps),
        ctypes.c_int64(num_tokens),
        ctypes.c_int64(dim),
        None if in_place else _pointer(y),
        ctypes.c_int32(post or in_place),
        ctypes.c_int32(centered),
    )
    return y


def gate(kernel: str, h: torch.Tensor, silu: bool = False) -> torch.Tensor:
    """Return the activation of the first half of each row times the second: (num_tokens, dim).

    The activation is the exact (erf) GELU or, if `silu`, x * sigmoid(x) (Shazeer 2020, arXiv:2002.05202). `h` is
    (num_tokens, 2 * dim) in the kernel's dtype, contiguous.
    """
    num_tokens, dim = h.shape[0], h.shape[1] // 2
    assert h.dtype == compiled.KERNELS[kernel].dtype
    assert h.is_contiguous()
    assert dim % LANES == 0
    gated = torch.empty((num_tokens, dim), dtype=h.dtype)
    sizes = ctypes.c_int64(num_tokens), ctypes.c_int64(dim)
    _function(kernel, "gate")(_pointer(h), _pointer(gated), *sizes, ctypes.c_int32(silu))
    return gated


def _attention(
    kernel: str, name: str, qkv: torch.Tensor, tables: tuple[object, ...], lengths: np.ndarray
) -> torch.Tensor:
    num_tokens, _, num_heads, head_dim = qkv.shape
    assert qkv.dtype == compiled.KERNELS[kernel].dtype
    assert qkv.is_contiguous()
    assert int(lengths.sum()) == num_tokens
    lengths = np.ascontiguousarray(lengths, np.int64)
    starts = np.cumsum(lengths) - lengths
    output = torch.empty((num_tokens, num_heads * head_dim), dtype=qkv.dtype)
    status = _function(kernel, name)(
        _pointer(qkv),
        *tables,
        ctypes.c_void_p(starts.ctypes.data),
        ctypes.c_void_p(lengths.ctypes.data),
        ctypes.c_int64(len(lengths)),
        ctypes.c_int64(num_heads),
        ctypes.c_int64(head_dim),
        _pointer(output),
    )
    if status:
        raise MemoryError(STATUS[status]) if status == 1 else AssertionError(STATUS[status])
    return output


def _function(kernel: str, name: str) -> Callable[..., int]:
    library = compiled.load(kernel)
    assert library is not None
    return getattr(library, name)


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
