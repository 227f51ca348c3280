"""Attention kernels for processors with AVX512-BF16, compiled once by the system's C compiler.

Without such a processor or a compiler, PyTorch's attention is used.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from seqmill.base.files import whole_or_absent
from seqmill.base.machine import processor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("attention_avx512.c")
INCLUDED = Path(__file__).with_name("arithmetic_avx512.c")
HEAD_DIMS = (16, 24, 32, 64, 128)
# Named extensions instead of -march=native, so that a cache in a shared home works on every node; no contraction, so
# that compilers agree on the bits.
FLAGS = ("-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-ffp-contract=off")
WRITABLE_BY_OTHERS = 0o022  # mode bits
DIGEST_BYTES = 32
STATUS = {1: "not enough memory for the attention's workspace", 2: "no attention kernel for this head dimension"}


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the compiled kernels; None, with the reason in the log, if they can't be used."""
    if not {"avx512_bf16", "avx512bw", "avx512vl", "avx512dq"} <= processor()[1]:
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        log.warning("no C compiler found: PyTorch's attention will be used, 3 to 5 times slower than our kernel")
        return None
    try:
        library = _loaded(compiler)
    except (OSError, subprocess.CalledProcessError, _NotSoundError) as error:
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

    Keys whose weights would vanish in float32's rounding are skipped, by a bound from the norms of the sequence's own
    queries and keys.

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


def _loaded(compiler: str) -> ctypes.CDLL:
    """Load the library from the user's cache, or build it for this process if the cache can't be used or trusted.

    A half-written library would crash the process with SIGBUS, and another user's library would run with our rights.
    """
    source = SOURCE.read_bytes() + INCLUDED.read_bytes()
    name = f"attention_avx512-{hashlib.sha256(source + ' '.join(FLAGS).encode()).hexdigest()[:16]}.so"
    try:
        folder = _cache_folder()
        with suppress(FileNotFoundError, _NotSoundError):
            return _load_sound(folder / name)
        _compile(compiler, folder / name)
        return _load_sound(folder / name)
    except (OSError, RuntimeError, _NotSoundError) as error:  # RuntimeError: there is no home folder
        log.info("our attention kernel is compiled for this process alone: %s", error)
    with tempfile.TemporaryDirectory(prefix="seqmill-") as private:
        _compile(compiler, Path(private, name))
        return _load_sound(Path(private, name))


def _cache_folder() -> Path:
    """Return the folder of compiled kernels; create it if absent, and make sure that only we can write to it."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqmill"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.stat()
    if state.st_uid != os.getuid():
        raise _NotSoundError(f"{folder} belongs to another user")
    if state.st_mode & WRITABLE_BY_OTHERS:  # for example after umask 002
        folder.chmod(stat.S_IMODE(state.st_mode) & ~WRITABLE_BY_OTHERS)
    return folder


def _load_sound(library: Path) -> ctypes.CDLL:
    """Check that a library is ours and ends with the digest of its content, and load the very file checked."""
    with os.fdopen(os.open(library, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        state = os.fstat(file.fileno())
        content = file.read()
        if state.st_uid != os.getuid() or state.st_mode & WRITABLE_BY_OTHERS:
            raise _NotSoundError(f"{library} can be written by another user")
        if hashlib.sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
            raise _NotSoundError(f"{library} is damaged")
        return ctypes.CDLL(f"/proc/self/fd/{file.fileno()}")


def _compile(compiler: str, library: Path) -> None:
    """Compile the library and append its digest; the file is whole or absent, even if others compile it as well."""
    with whole_or_absent(library) as built:
        command = [compiler, *FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(built), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        built.chmod(0o600)
        digest = hashlib.sha256(built.read_bytes()).digest()
        with built.open("ab") as file:
            file.write(digest)  # the loader ignores bytes after the library


class _NotSoundError(Exception):
    """A library or folder that must not be trusted."""
