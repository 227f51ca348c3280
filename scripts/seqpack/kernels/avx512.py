"""The attention kernels for processors with AVX512-BF16, compiled once by the system's C compiler.

Where there is no such processor or no compiler, PyTorch's attention serves.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from seqpack.devices import processor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("attention_avx512.c")
INCLUDED = Path(__file__).with_name("arithmetic_avx512.c")
HEAD_DIMS = (16, 24, 32, 64, 128)
# Named extensions, not the machine's own, so that a cache on a shared home serves every node; no
# contraction, so that compilers agree on the bits.
FLAGS = ("-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-ffp-contract=off")
STATUS = {1: "not enough memory for the attention's workspace", 2: "no attention kernel for this head dimension"}


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the compiled kernel; None, with the reason in the log, where it can't be had."""
    if not {"avx512_bf16", "avx512bw", "avx512vl", "avx512dq"} <= processor()[1]:
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        log.warning("no C compiler found: PyTorch's attention will be used, 3 to 5 times slower than our kernel")
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: there is no home folder
        reason = getattr(error, "stderr", None) or error
        log.warning("our attention kernel can't be compiled, PyTorch's will be used: %s", reason)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.rope_attention.argtypes = [pointer] * 5 + [number] * 3 + [pointer]
    library.alibi_attention.argtypes = [pointer] * 4 + [number] * 3 + [pointer]
    return library


def rope_attention(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, lengths: np.ndarray) -> torch.Tensor:
    """Rotate queries and keys, then attend: softmax with scores scaled by head_dim ** -0.5.

    Args:
        qkv: bfloat16 (num_tokens, 3, num_heads, head_dim), contiguous, on the CPU.
        cos, sin: float32 (at least the longest length, head_dim), contiguous; see `esm2.rope_tables`.
        lengths: int64 (num_sequences,), tokens in each sequence.

    Returns:
        bfloat16 (num_tokens, num_heads * head_dim).
    """
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert int(lengths.max()) <= len(cos) == len(sin)
    return _attention("rope_attention", qkv, (cos, sin), lengths)


def alibi_attention(qkv: torch.Tensor, slopes: torch.Tensor, lengths: np.ndarray) -> torch.Tensor:
    """Attend with linear biases: softmax of scores scaled by head_dim ** -0.5, less slope x distance.

    Keys so far away that their weights are lost in float32's rounding are left out, by a bound from the
    norms of the sequence's own queries and keys.

    Args:
        qkv: bfloat16 (num_tokens, 3, num_heads, head_dim), contiguous, on the CPU.
        slopes: float32 (num_heads,), positive; see `alibi.slopes`.
        lengths: int64 (num_sequences,), tokens in each sequence.

    Returns:
        bfloat16 (num_tokens, num_heads * head_dim).
    """
    assert slopes.dtype == torch.float32
    assert slopes.shape == qkv.shape[2:3]
    return _attention("alibi_attention", qkv, (slopes.contiguous(),), lengths)


def _attention(name: str, qkv: torch.Tensor, tables: tuple[torch.Tensor, ...], lengths: np.ndarray) -> torch.Tensor:
    library = load()
    assert library is not None
    num_tokens, _, num_heads, head_dim = qkv.shape
    assert qkv.dtype == torch.bfloat16
    assert qkv.is_contiguous()
    assert int(lengths.sum()) == num_tokens
    lengths = np.ascontiguousarray(lengths, np.int64)
    starts = np.cumsum(lengths) - lengths
    output = torch.empty((num_tokens, num_heads * head_dim), dtype=torch.bfloat16)
    status = getattr(library, name)(
        qkv.data_ptr(),
        *(table.data_ptr() for table in tables),
        starts.ctypes.data,
        lengths.ctypes.data,
        len(lengths),
        num_heads,
        head_dim,
        output.data_ptr(),
    )
    if status:
        raise MemoryError(STATUS[status]) if status == 1 else AssertionError(STATUS[status])
    return output


def _compiled(compiler: str) -> Path:
    """Return the shared library, compiling it if the cache lacks it."""
    source = SOURCE.read_bytes() + INCLUDED.read_bytes()
    key = hashlib.sha256(source + " ".join(FLAGS).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqpack"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="seqpack-"))
    library = folder / f"attention_avx512-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / library.name
            command = [compiler, *FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(built), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            built.replace(library)  # whole or absent, whoever else compiles it at the same time
    return library
