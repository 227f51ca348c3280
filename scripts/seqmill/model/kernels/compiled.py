"""The C kernels as shared libraries: from the wheel, or compiled once by the system's C compiler.

A wheel ships them next to their sources (see setup.py). A source checkout compiles each at its first use and keeps it
in the user's cache.
"""

import ctypes
import functools
import hashlib
import logging
import os
import stat
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from seqmill.base.files import cache_folder, whole_or_absent
from seqmill.base.machine import processor
from seqmill.model.kernels.build import KERNELS as KERNELS  # for users of this module
from seqmill.model.kernels.build import SOURCES, compile_command, find_compiler, library_file

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

WRITABLE_BY_OTHERS = 0o022  # mode bits
DIGEST_BYTES = 32
_OPEN: list[ExitStack] = []  # the files of loaded libraries
_REFUSED: dict[str, str] = {}  # kernels that this process can't use, with the reason


def of_dtype(dtype: "torch.dtype") -> str | None:
    """Return the name of the fastest kernel for a dtype that works on this machine; None if there is none."""
    names = [name for name, kernel in KERNELS.items() if kernel.dtype == dtype]
    if names and all(map(missing_features, names)):
        _warn_without_kernel(KERNELS[names[0]].precision)
    return next(filter(load, names), None)


@functools.cache  # once per process
def _warn_without_kernel(precision: str) -> None:
    log.warning(
        "no kernel of ours is for this processor and system in %s: attention may be 3 to 6 times slower", precision
    )


def missing_features(name: str) -> list[str]:
    """Return the features that the processor lacks for a kernel, by Linux's names."""
    return sorted(KERNELS[name].features - processor()[1])


def why_not(name: str) -> str:
    """Return why a kernel can't be used on this machine; empty if it can."""
    if missing := missing_features(name):
        return f"the processor has no {', '.join(missing)}" if sys.platform == "linux" else "it is for Linux alone"
    no_library = "this installation has no compiled library for it, and there is no working C compiler"
    return "" if load(name) else _REFUSED.get(name, no_library)


@functools.cache
def load(name: str) -> ctypes.CDLL | None:
    """Return a kernel's library; None, with the reason in the log unless it is the processor, if it can't be used."""
    if missing_features(name):
        return None
    file = library_file(name)
    try:
        return _prepared(name, _load_shipped(file) or _load_compiled(name, file))
    except _NoCompilerError:
        _warn_without_compiler()
    except (OSError, subprocess.CalledProcessError, _NotSoundError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        _REFUSED[name] = f"it can't be compiled: {reason}"
        log.warning("our %s kernel can't be compiled, a slower one will be used: %s", name, reason)
    return None


@functools.cache  # once per process, not once per kernel
def _warn_without_compiler() -> None:
    log.warning(
        "no C compiler found, and this installation lacks a compiled kernel for this processor: attention may be 3 to "
        "6 times slower; install seqmill from a wheel built for this platform, or install a C compiler"
    )


def _load_shipped(file: str) -> ctypes.CDLL | None:
    """Load the library that came with the package, if it was built from these sources; None if that is impossible.

    It needs no check of owner or content: it is as trustworthy as the Python files next to it.
    """
    library = SOURCES / file
    if not library.exists():
        return None
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:  # for example, it needs a newer C library than this system's
        log.info("the kernel that came with seqmill can't be loaded, it will be compiled: %s", error)
        return None


def _prepared(name: str, library: ctypes.CDLL) -> ctypes.CDLL | None:
    """Ask Linux, once per process, for what a kernel needs beyond the processor: the permission to use AMX tiles."""
    error = library.prepare_processor() if hasattr(library, "prepare_processor") else 0
    if error == 0:
        return library
    _REFUSED[name] = f"Linux does not let this process use AMX tiles ({os.strerror(error)})"
    log.warning("attention avx512_bf16 is used instead of %s: %s", name, _REFUSED[name])
    return None


def _load_compiled(name: str, file: str) -> ctypes.CDLL:
    """Load the library from the user's cache, or build it for this process if the cache can't be used or trusted.

    A half-written library would crash the process with SIGBUS, and another user's library would run with our rights.
    """
    try:
        folder = _cache_folder()
        with suppress(FileNotFoundError, _NotSoundError):
            return _load_sound(folder / file)
        _compile(name, folder / file)
        return _load_sound(folder / file)
    except (OSError, RuntimeError, _NotSoundError) as error:  # RuntimeError: there is no home folder
        log.info("our %s kernel is compiled for this process alone: %s", name, error)
    with tempfile.TemporaryDirectory(prefix="seqmill-") as private:
        _compile(name, Path(private, file))
        return _load_sound(Path(private, file))


def _cache_folder() -> Path:
    """Return the folder of compiled kernels; create it if absent, and make sure that only we can write to it."""
    folder = cache_folder()
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


def _compile(name: str, library: Path) -> None:
    """Compile the library and append its digest; the file is whole or absent, even if others compile it as well."""
    compiler = find_compiler()
    if compiler is None:
        raise _NoCompilerError
    with whole_or_absent(library) as built:
        subprocess.run(compile_command(compiler, name, built), check=True, capture_output=True, text=True)
        built.chmod(0o600)
        digest = hashlib.sha256(built.read_bytes()).digest()
        with built.open("ab") as file:
            file.write(digest)  # the loader ignores bytes after the library


class _NoCompilerError(Exception):
    """There is no C compiler."""


class _NotSoundError(Exception):
    """A library or folder that must not be trusted."""
