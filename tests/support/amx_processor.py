"""A processor with AMX, emulated: `amx_emulator.c` executes the tile instructions, and the package is told of them.

The rest of the kernel is AVX512-BF16 machine code, which the machine must have.
"""

import os
import subprocess
from pathlib import Path

from pipeline import SCRIPTS
from seqmill.base import machine

EMULATOR = Path(__file__).with_name("amx_emulator.c")


def emulated(folder: Path, **variables: str) -> dict[str, str]:
    """Compile the emulator; return an environment that preloads it into processes and has these variables.

    What this process preloads stays first: a sanitizer must be.
    """
    library = folder / "amx_emulator.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O3", "-mfma", "-mavx512f", "-shared", "-fPIC", EMULATOR, "-o", library], check=True)
    path = os.pathsep.join((str(SCRIPTS), str(EMULATOR.parent)))
    libraries = f"{os.environ.get('LD_PRELOAD', '')} {library}".strip()
    return {**os.environ, "LD_PRELOAD": libraries, "PYTHONPATH": path, **variables}


def pretend() -> None:
    """Let the package see AMX among the processor's features. Call it before kernels are imported."""
    name, features = machine.processor()
    machine.processor = lambda: (name, features | {"amx_tile", "amx_bf16"})  # type: ignore[assignment]


def pytest_configure() -> None:
    """Pretend in a pytest session that has this module as a plugin."""
    pretend()
