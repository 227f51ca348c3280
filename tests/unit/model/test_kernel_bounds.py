"""Kernels stay within their arrays, at any alignment: each array is next to memory that must not be accessed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from amx_processor import emulated

from pipeline import SCRIPTS
from seqmill.model.kernels import compiled
from seqmill.model.kernels.cpu import HEAD_DIMS

USABLE = [name for name in compiled.KERNELS if compiled.load(name)]
EMULATED = ["amx"] if "avx512_bf16" in USABLE and "amx" not in USABLE else []
pytestmark = pytest.mark.skipif(not USABLE, reason="no kernel for this processor, or no C compiler")
ARRAYS = ["qkv", "cosines", "sines", "query_weight", "key_weight", "slopes", "biases", "starts", "lengths", "output"]
ARRAYS += ["x", "delta", "weight", "bias", "y", "h", "gated"]
# Arguments: the kernel, whether arrays are before or after the forbidden memory, an array to make too short, head dims.
CODE = """
import ctypes, mmap, os, sys
import numpy as np
if "amx_emulator" in os.environ.get("LD_PRELOAD", ""):
    import amx_processor
    amx_processor.pretend()
from seqmill.model.kernels import compiled

kernel, side, short, *head_dims = sys.argv[1:]
element = {"bfloat16": np.uint16, "float32": np.float32}[compiled.KERNELS[kernel].precision]
random = np.random.default_rng(0)
held = []

def values(*shape, dtype=np.float32):
    numbers = random.standard_normal(shape, np.float32)
    return numbers if dtype == np.float32 else (numbers.view(np.uint32) >> 16).astype(np.uint16)

def place(name, array):
    if name == short:
        array = array[:-1]
    size = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + 2 * mmap.PAGESIZE)
    start = mmap.PAGESIZE + (size - array.nbytes if side == "before" else 0)
    memory[start : start + array.nbytes] = array.tobytes()
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + mmap.PAGESIZE + size):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, 0) == 0
    held.append(memory)
    return ctypes.c_void_p(address + start)

def converted(argument):
    if isinstance(argument, tuple):
        return place(*argument)
    return {int: ctypes.c_int64, float: ctypes.c_float}.get(type(argument), lambda given: given)(argument)

def call(function, *arguments):
    return getattr(compiled.load(kernel), function)(*map(converted, arguments))

lengths = np.array([65, 33, 32, 17, 2, 1])
num_tokens, num_heads = int(lengths.sum()), 3
sequences = ("starts", lengths.cumsum() - lengths), ("lengths", lengths)
for head_dim in map(int, head_dims):
    qkv = "qkv", values(num_tokens, 3, num_heads, head_dim, dtype=element)
    output = "output", np.zeros((num_tokens, num_heads, head_dim), element)
    tables = [(name, values(lengths.max(), head_dim)) for name in ("cosines", "sines")]
    slopes = "slopes", np.full(num_heads, 0.5, np.float32)
    weights = [(name, values(num_heads, head_dim)) for name in ("query_weight", "key_weight")]
    biases = "biases", values(num_heads, 2 * 40 + 1)
    for function, positions in (
        ("rope_attention", tables),
        ("normalized_rope_attention", [*tables, *weights, 1e-5]),
        ("alibi_attention", [slopes]),
        ("relative_attention", [biases, 40]),
    ):
        assert call(function, qkv, *positions, *sequences, len(lengths), num_heads, head_dim, output) == 0

rows, dim = 5, 48
x, delta = ("x", values(rows, dim)), ("delta", values(rows, dim, dtype=element))
weight, bias = ("weight", values(dim)), ("bias", values(dim))
y = "y", np.zeros((rows, dim), element)
h, gated = ("h", values(rows, 2 * dim, dtype=element)), ("gated", np.zeros((rows, dim), element))
for flag in (ctypes.c_int32(0), ctypes.c_int32(1)):
    call("add_norm", x, delta, weight, bias, 1e-5, rows, dim, y, ctypes.c_int32(1), flag)
    call("gate", h, gated, rows, dim, flag)
"""


def run(kernel: str, side: str, short: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = emulated(folder) if kernel in EMULATED else {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    command = [sys.executable, "-c", CODE, kernel, side, short, *map(str, HEAD_DIMS)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("kernel", [*USABLE, *EMULATED])
@pytest.mark.parametrize("side", ["before", "after"])
def test_kernels_stay_within_their_arrays(kernel: str, side: str, tmp_path: Path) -> None:
    done = run(kernel, side, "none", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("short", ARRAYS)
def test_an_access_past_the_end_is_noticed(short: str, tmp_path: Path) -> None:
    """Shows that the test above can fail."""
    assert run(USABLE[0], "before", short, tmp_path).returncode == -signal.SIGSEGV
