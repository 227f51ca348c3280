"""Fake GPUs: an `nvidia-smi` on PATH, and workers that lease the GPUs but compute on the CPU."""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from pipeline import REPOSITORY, SCRIPTS, SUPPORT

# On PYTHONPATH it makes workers compute on the CPU, see sitecustomize.py there.
ON_CPU = ":".join(map(str, (REPOSITORY / "tests/fake_gpus", SUPPORT, SCRIPTS)))
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


class _OnCpu:
    """Finds `seqmill.embedding.device`, and replaces the choice of the device once it is loaded."""

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "seqmill.embedding.device":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_replace(module: ModuleType) -> None:
            load(module)
            module.choose_device = lambda device: module.torch.device("cpu")  # type: ignore[attr-defined]

        spec.loader.exec_module = load_and_replace  # type: ignore[method-assign]
        return spec


def compute_on_cpu() -> None:
    """Let this process compute on the CPU, whatever GPUs are visible."""
    sys.meta_path.insert(0, _OnCpu())  # type: ignore[arg-type]
