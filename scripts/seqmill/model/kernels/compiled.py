"""The C kernels as shared libraries: compiled once by the system's C compiler, kept in the user's cache."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from seqmill.base.files import whole_or_absent
from seqmill.base.machine import processor

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
# No contraction: the sources say where products and sums are fused, so compilers and processors agree on the bits.
FLAGS = ("-O3", "-ffp-contract=off", "-shared", "-fPIC")
WRITABLE_BY_OTHERS = 0o022  # mode bits
DIGEST_BYTES = 32
_OPEN: list[ExitStack] = []  # the files of loaded libraries


@dataclass(frozen=True)
class Kernel:
    """A library for one kind of processor and one dtype: attention, and the elementwise steps around it.

    `features` are those that the processor must have, by Linux's names; `flags` name them to the compiler instead of
    -march=native, so that a cache in a shared home works on every node.
    """

    dtype: torch.dtype
    attention: str  # source file; elementwise.c is the other
    features: frozenset[str]
    flags: tuple[str, ...]


_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
_AVX512_FEATURES = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})
_AVX512_BF16 = (*_AVX512, "-mavx512bf16")
_AVX512_BF16_FEATURES = _AVX512_FEATURES | {"avx512_bf16"}
# Fastest first, for each dtype.
KERNELS = {
    "amx": Kernel(
        torch.bfloat16,
        "attention_amx.c",
        _AVX512_BF16_FEATURES | {"amx_tile", "amx_bf16"},
        (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"),
    ),
    "avx512_bf16": Kernel(torch.bfloat16, "attention_avx512_bf16.c", _AVX512_BF16_FEATURES, _AVX512_BF16),
    "avx512": Kernel(torch.float32, "attention_float32.c", _AVX512_FEATURES, _AVX512),
    "avx2": Kernel(torch.float32, "attention_float32.c", frozenset({"avx2", "fma"}), ("-mavx2", "-mfma")),
    "neon": Kernel(torch.float32, "attention_float32.c", frozenset({"asimd"}), ()),
}


def of_dtype(dtype: torch.dtype) -> str | None:
    """Return the name of the fastest kernel for a dtype that works on this machine; None if there is none."""
    return next((name for name, kernel in KERNELS.items() if kernel.dtype == dtype and load(name)), None)


def why_not(name: str) -> str:
    """Return why a kernel can't be used on this machine; empty if it can."""
    missing = KERNELS[name].features - processor()[1]
    if missing:
        return f"the processor has no {', '.join(sorted(missing))}"
    return "" if load(name) else _REFUSED.get(name, "there is no working C compiler")


@functools.cache
def load(name: str) -> ctypes.CDLL | None:
    """Return a kernel's library; None, with the reason in the log unless it is the processor, if it can't be used."""
    kernel = KERNELS[name]
    if not kernel.features <= processor()[1]:
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        log.warning("no C compiler found: PyTorch's attention will be used, 3 to 5 times slower than our kernel")
        return None
    try:
        library = _prepared(name, _loaded(compiler, name, kernel))
    except (OSError, subprocess.CalledProcessError, _NotSoundError) as error:
        reason = getattr(error, "stderr", None) or error
        log.warning("our %s kernel can't be compiled, PyTorch's will be used: %s", name, reason)
        return None
    return library


_REFUSED: dict[str, str] = {}  # kernels that load but can't be used, with the reason


def _prepared(name: str, library: ctypes.CDLL) -> ctypes.CDLL | None:
    """Ask Linux, once per process, for what a kernel needs beyond the processor: the permission to use AMX tiles."""
    error = library.prepare_processor() if hasattr(library, "prepare_processor") else 0
    if error == 0:
        return library
    _REFUSED[name] = f"Linux does not let this process use AMX tiles ({os.strerror(error)})"
    log.warning("attention avx512_bf16 is used instead of %s: %s", name, _REFUSED[name])
    return None


def _loaded(compiler: str, name: str, kernel: Kernel) -> ctypes.CDLL:
    """Load the library from the user's cache, or build it for this process if the cache can't be used or trusted.

    A half-written library would crash the process with SIGBUS, and another user's library would run with our rights.
    """
    digest = hashlib.sha256(" ".join((*FLAGS, *kernel.flags, platform.machine())).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.read_bytes())
    file = f"{name}-{digest.hexdigest()[:16]}.so"
    try:
        folder = _cache_folder()
        with suppress(FileNotFoundError, _NotSoundError):
            return _load_sound(folder / file)
        _compile(compiler, kernel, folder / file)
        return _load_sound(folder / file)
    except (OSError, RuntimeError, _NotSoundError) as error:  # RuntimeError: there is no home folder
        log.info("our %s kernel is compiled for this process alone: %s", name, error)
    with tempfile.TemporaryDirectory(prefix="seqmill-") as private:
        _compile(compiler, kernel, Path(private, file))
        return _load_sound(Path(private, file))


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
    with ExitStack() as stack:
        file = stack.enter_context(os.fdopen(os.open(library, os.O_RDONLY | os.O_NOFOLLOW), "rb"))
        state = os.fstat(file.fileno())
        content = file.read()
        if state.st_uid != os.getuid() or state.st_mode & WRITABLE_BY_OTHERS:
            raise _NotSoundError(f"{library} can be written by another user")
        if hashlib.sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
            raise _NotSoundError(f"{library} is damaged")
        loaded = ctypes.CDLL(f"/proc/self/fd/{file.fileno()}")
        # The loader takes a second library with the same name for the first, so the descriptor stays in use.
        _OPEN.append(stack.pop_all())
        return loaded


def _compile(compiler: str, kernel: Kernel, library: Path) -> None:
    """Compile the library and append its digest; the file is whole or absent, even if others compile it as well."""
    with whole_or_absent(library) as built:
        sources = [str(SOURCES / name) for name in (kernel.attention, "elementwise.c")]
        command = [compiler, *FLAGS, *kernel.flags, *sources, "-o", str(built), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        built.chmod(0o600)
        digest = hashlib.sha256(built.read_bytes()).digest()
        with built.open("ab") as file:
            file.write(digest)  # the loader ignores bytes after the library


class _NotSoundError(Exception):
    """A library or folder that must not be trusted."""
