"""The C kernels by name, and how each is compiled. It imports nothing of the package, because setup.py loads it."""

import hashlib
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SOURCES = Path(__file__).parent
# No contraction: the sources say where products and sums are fused, so compilers and processors agree on the bits.
FLAGS = ("-O3", "-ffp-contract=off", "-shared", "-fPIC")


@dataclass(frozen=True)
class Kernel:
    """A library for one kind of processor and one dtype: attention, and the elementwise steps around it.

    `machine` and `features` are what the processor must have, by Linux's names; `flags` name the features to the
    compiler instead of -march=native, so that a library works on every such processor.
    """

    precision: str  # PyTorch's name of the dtype
    attention: str  # source file; elementwise.c is the other
    machine: str
    features: frozenset[str]
    flags: tuple[str, ...]

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype of queries, keys, values, and results."""
        import torch  # setup.py may not have it

        return getattr(torch, self.precision)


_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
_AVX512_FEATURES = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})
_AVX512_BF16 = (*_AVX512, "-mavx512bf16")
_AVX512_BF16_FEATURES = _AVX512_FEATURES | {"avx512_bf16"}
# Fastest first, for each dtype.
KERNELS = {
    "amx": Kernel(
        "bfloat16",
        "attention_amx.c",
        "x86_64",
        _AVX512_BF16_FEATURES | {"amx_tile", "amx_bf16"},
        (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"),
    ),
    "avx512_bf16": Kernel("bfloat16", "attention_avx512_bf16.c", "x86_64", _AVX512_BF16_FEATURES, _AVX512_BF16),
    "avx512": Kernel("float32", "attention_float32.c", "x86_64", _AVX512_FEATURES, _AVX512),
    "avx2": Kernel("float32", "attention_float32.c", "x86_64", frozenset({"avx2", "fma"}), ("-mavx2", "-mfma")),
    "neon": Kernel("float32", "attention_float32.c", "aarch64", frozenset({"asimd"}), ()),
}


def find_compiler() -> str | None:
    """Return the path of a C compiler: $CC, cc, gcc, or clang."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


def library_file(name: str) -> str:
    """Return the file name of a kernel's library; it holds a digest of the sources and flags."""
    digest = hashlib.sha256(" ".join((*FLAGS, *KERNELS[name].flags, platform.machine())).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.read_bytes())
    return f"{name}-{digest.hexdigest()[:16]}.so"


def compile_command(compiler: str, name: str, library: Path) -> list[str]:
    """Return the command that compiles a kernel's sources to `library`."""
    kernel = KERNELS[name]
    sources = [str(SOURCES / source) for source in (kernel.attention, "elementwise.c")]
    return [compiler, *FLAGS, *kernel.flags, *sources, "-o", str(library), "-lm"]
