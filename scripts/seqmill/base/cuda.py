"""NVIDIA drivers, and the CUDA that torch is built for; torch is not imported.

The figures are NVIDIA's (CUDA release notes, minor version compatibility; Linux). No GPU was at hand to test them.
"""

import os
import re
from importlib.util import find_spec
from pathlib import Path

from seqmill.base import machine
from seqmill.base.words import in_one_line, many

OLDEST_DRIVERS = {12: "525.60", 13: "580.65"}  # by CUDA's major version
OLDEST_CAPABILITIES = {13: "7.5"}  # CUDA 13 compiles for Turing and later; Volta and older are gone
INSTEAD = "use device cpu"


def installed_torch() -> tuple[str, str] | None:
    """Return the version of the installed torch and of the CUDA it is built for ("" for none); None without torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    version, cuda = (re.search(rf"^{name}\b.*= *'([^']+)'", text, re.MULTILINE) for name in ("__version__", "cuda"))
    return (version[1] if version else "of an unknown version"), (cuda[1] if cuda else "")


def why_unusable(gpus: list[str], torch: str, cuda: str, error: str = "") -> str:
    """Say in one line why torch can't use the visible GPUs, with the versions and what to do.

    Args:
        gpus: the visible ones.
        torch: its version.
        cuda: the CUDA it is built for; empty if there is none.
        error: torch's own reason, which counts if the versions fit each other.
    """
    driver, variable = machine.driver_version(), os.environ.get("CUDA_VISIBLE_DEVICES")
    found = f"driver {driver}" if driver else "no driver (nvidia-smi does not answer)"
    told = "" if variable is None else f" (CUDA_VISIBLE_DEVICES={variable})"
    built = f"CUDA {cuda}{_needs(cuda)}" if cuda else "no CUDA: it is a CPU build"
    reason, remedy = "", "install a newer driver or a torch wheel for an older CUDA"
    if not driver:
        remedy = "install the driver, or start the container with its GPUs (apptainer --nv, docker --gpus all)"
        if told:
            remedy = f"unset CUDA_VISIBLE_DEVICES if there is no GPU; otherwise {remedy}"
    elif not (fitting := _cuda_of(driver)):
        remedy = f"install driver {OLDEST_DRIVERS[min(OLDEST_DRIVERS)]} or newer and a torch wheel for CUDA"
    elif not cuda:
        remedy = f"install a torch wheel for CUDA {fitting}"
    elif not is_too_old(driver, cuda):
        reason, remedy = (f"; torch says: {in_one_line(error)}" if error else ""), "check the GPUs with nvidia-smi"
    are, them = ("is", "it") if len(gpus) == 1 else ("are", "them")
    return (
        f"{many(len(gpus), 'GPU')} {are} visible{told}, but torch can't use {them}: {found}, torch {torch} with "
        f"{built}{reason}; {remedy}, or {INSTEAD}"
    )


def why_no_kernels(name: str, capability: tuple[int, int], torch: str, cuda: str, architectures: list[str]) -> str:
    """Say in one line why a GPU can't run torch's kernels; empty if it can, or if the architectures are not known.

    Args:
        name: the GPU's.
        capability: the GPU's compute capability.
        torch, cuda: see `why_unusable`.
        architectures: as `torch.cuda.get_arch_list` names them: sm_90 is machine code for compute capability 9.0 and
            later minor versions, sm_90a for 9.0 alone, and compute_90 is compiled by the driver for 9.0 and later.
    """
    built = set()
    for text in architectures:
        if found := re.fullmatch(r"(sm|compute)_(\d+)(\d)(a?)f?", text):
            kind, version, only = found[1], (int(found[2]), int(found[3])), found[4]
            is_older = version < capability and (kind == "compute" or version[0] == capability[0])
            if version == capability or (is_older and not only):
                return ""
            built.add(version)
    if not built:
        return ""
    kernels, age = ", ".join(f"{major}.{minor}" for major, minor in sorted(built)), "an older"
    if capability > min(built):
        age = "a newer"
    return (
        f"{name} has compute capability {capability[0]}.{capability[1]}, and torch {torch} with CUDA {cuda} has "
        f"kernels for {kernels}; install a torch wheel for {age} CUDA, or {INSTEAD}"
    )


def is_too_old(driver: str, cuda: str) -> bool:
    """Return whether a driver is older than a CUDA needs; False if that is not known."""
    needed = OLDEST_DRIVERS.get(_numbers(cuda)[0])
    return needed is not None and _numbers(driver) < _numbers(needed)


def too_old_gpus(cuda: str) -> list[str]:
    """Return the GPUs for which a CUDA can't compile any more, with their compute capabilities."""
    oldest = OLDEST_CAPABILITIES.get(_numbers(cuda)[0])
    if not oldest:
        return []
    found = machine.gpu_capabilities().items()
    return [f"{name} ({capability})" for name, capability in found if _numbers(capability) < _numbers(oldest)]


def _needs(cuda: str) -> str:
    needed = OLDEST_DRIVERS.get(_numbers(cuda)[0])
    return f", which needs driver {needed} or newer" if needed else ""


def _cuda_of(driver: str) -> str:
    """Return the CUDA versions that a driver supports, as far as they are known: "12 or 13"."""
    fitting = [str(major) for major, needed in OLDEST_DRIVERS.items() if _numbers(driver) >= _numbers(needed)]
    return " or ".join(fitting)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version))) or (0,)
