"""Fake GPUs: an `nvidia-smi` for PATH, and workers that lease the GPUs but compute on the CPU."""

from collections.abc import Sequence
from pathlib import Path

from pipeline import REPOSITORY

COMPUTE_ON_CPU = str(
    REPOSITORY / "tests/fake_gpus"
)  # on PYTHONPATH it makes workers compute on the CPU, see sitecustomize.py
UUIDS = [f"GPU-5a8f8f1e-0001-0002-0003-{number:012}" for number in range(8)]


def write_nvidia_smi(
    folder: Path,
    uuids: Sequence[str] = UUIDS[:1],
    driver: str = "580.95.05",
    name: str = "NVIDIA H100 80GB HBM3",
    capability: str = "9.0",
) -> None:
    """Write an nvidia-smi that answers the questions of `seqmill.base.machine` as the real one does."""
    listed = [f"GPU {number}: {name} (UUID: {uuid})" for number, uuid in enumerate(uuids)]
    answers = {
        "-L": listed,
        "--query-gpu=driver_version --format=csv,noheader": [driver] * len(uuids),
        "--query-gpu=name,compute_cap --format=csv,noheader": [f"{name}, {capability}"] * len(uuids),
    }
    cases = [f'"{asked}") ' + "; ".join(f"echo '{line}'" for line in lines) for asked, lines in answers.items()]
    program = folder / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$*" in\n' + ";;\n".join(cases) + ";;\n*) exit 2;;\nesac\n")
    program.chmod(0o755)
