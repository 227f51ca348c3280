"""The machine that the process runs on: its GPUs, its processor, its memory, and its limits.

Linux tells most in files and by calls of its own; where macOS has neither, the functions fall back on what POSIX has.
"""

import functools
import itertools
import os
import platform
import re
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
UUID = re.compile(r"\(UUID: ([^)]+)\)$")  # at the end of a line of `nvidia-smi -L`
MACOS_FILES = 10240  # OPEN_MAX: macOS calls the limit of open files unlimited, but refuses a higher one


def visible_gpus() -> list[str]:
    """Return the NVIDIA GPUs this process may use, as indices or UUIDs; empty if there are none.

    CUDA_VISIBLE_DEVICES decides if it is set; otherwise nvidia-smi lists them, so torch is not imported. CUDA ignores
    the variable from its first invalid entry on; "-1" is the usual way to hide all GPUs.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        names = (name.strip() for name in listed.split(","))
        return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))
    return [str(number) for number in range(len(listed_gpus()))]


def listed_gpus() -> list[str]:
    """Return the UUIDs of the GPUs that nvidia-smi lists, in its order; "" for one without a UUID.

    Within a SLURM job or a container these are the GPUs of the job or the container.
    """
    lines = [line for line in _ask_nvidia_smi("-L") if line.startswith("GPU ")]
    return [found[1] if (found := UUID.search(line)) else "" for line in lines]


def driver_version() -> str:
    """Return the version of the NVIDIA driver, such as 580.65.06; empty if nvidia-smi does not tell it."""
    return next(iter(_query_gpus("driver_version")), "")


def gpu_capabilities() -> dict[str, str]:
    """Return the names of the GPUs that nvidia-smi lists, with their compute capabilities such as 9.0.

    It is empty if nvidia-smi does not answer, or does not know the capabilities, as with drivers before 510.
    """
    rows = (line.rpartition(", ") for line in _query_gpus("name,compute_cap"))
    return {name: capability for name, _, capability in rows}


def _query_gpus(fields: str) -> list[str]:
    return _ask_nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader")


def _ask_nvidia_smi(*arguments: str) -> list[str]:
    """Return the lines that nvidia-smi prints; none if it is missing, fails or hangs."""
    try:
        answer = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.splitlines() if answer.returncode == 0 else []


@functools.cache
def processor() -> tuple[str, frozenset[str]]:
    """Return the processor's name and its features as Linux names them, e.g. avx512_bf16; without Linux, no features.

    Linux has no name for Arm processors; the name is then that of the architecture.
    """
    fields: dict[str, str] = {}
    with suppress(OSError):
        for line in (PROC / "cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    return fields.get("model name", f"{platform.machine()} CPU"), frozenset(
        fields.get("flags", fields.get("Features", "")).split()
    )


def usable_cores() -> int:
    """Return the number of cores that this process may use; those of the machine if it can't be bound to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """Return the peak memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def allow_many_files() -> None:
    """Raise the process's limit of open files as far as the system lets it."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (ValueError, OSError):
        if now < MACOS_FILES:
            resource.setrlimit(resource.RLIMIT_NOFILE, (MACOS_FILES, most))


def available_memory(proc: Path = PROC, cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes this process can still take: the machine's available memory, or its cgroups' rest if less.

    A cgroup's inactive file pages count as free. Without Linux's files, all memory of the machine counts as available.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError):
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                root = cgroups / "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            folder = root / path.lstrip("/")
            levels = [folder, *folder.parents]
            for level in levels[: levels.index(root) + 1]:
                limits.extend(_left_in_cgroup(level, *names))
    return min(limits)


def _left_in_cgroup(folder: Path, limit: str, usage: str, inactive: str) -> list[int]:
    try:
        most, used = ((folder / name).read_text().strip() for name in (limit, usage))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # the level does not exist: a container sees its host's path
        return []
    return [] if most == "max" else [int(most) - int(used) + int(statistics.get(inactive, 0))]
