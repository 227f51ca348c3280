"""Which NVIDIA drivers and GPUs a torch wheel can use, and what is said if it can't."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fake_gpus import UUIDS, write_nvidia_smi
from seqmill.base import cuda
from seqmill.base.cuda import installed_torch, is_too_old, too_old_gpus, why_no_kernels, why_unusable
from seqmill.base.machine import driver_version, gpu_capabilities, listed_gpus

CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_nvidia_smi_is_asked(path: Path) -> None:
    assert (listed_gpus(), driver_version(), gpu_capabilities()) == ([], "", {})
    write_nvidia_smi(path, UUIDS[:2], "535.104.05", "Tesla V100-SXM2, 16GB", "7.0")
    assert listed_gpus() == UUIDS[:2]
    assert driver_version() == "535.104.05"
    assert gpu_capabilities() == {"Tesla V100-SXM2, 16GB": "7.0"}


def test_the_installed_torch_is_known_without_importing_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed_torch() == (str(torch.__version__), torch.version.cuda or "")
    code = "from seqmill.base.cuda import installed_torch; import sys; assert installed_torch(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout.split()
    (path / "torch").mkdir()
    (path / "torch/__init__.py").touch()
    # As a wheel for CUDA has it.
    text = "from typing import Optional\n\n__all__ = ['__version__', 'cuda', 'hip']\n__version__ = '2.13.0+cu130'\n"
    (path / "torch/version.py").write_text(text + "debug = False\ncuda: Optional[str] = '13.0'\nhip: None = None\n")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.syspath_prepend(path)
    assert installed_torch() == ("2.13.0+cu130", "13.0")
    (path / "torch/version.py").unlink()
    assert installed_torch() is None
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    assert installed_torch() is None


@pytest.mark.parametrize(
    ("driver", "version", "too_old"),
    [
        *[
            ("580.65.06", "13.0", False),
            ("580.64.99", "13.0", True),
            ("579.99", "13.2", True),
            ("610.1", "13.2", False),
        ],
        *[("525.60.13", "12.8", False), ("520.61.05", "12.6", True), ("450.80", "11.8", False), ("1.2", "14.0", False)],
    ],
)
def test_drivers(driver: str, version: str, too_old: bool) -> None:
    assert is_too_old(driver, version) == too_old


UNUSABLE = {
    "an old driver": (
        ("535.104.05", "2.13.0+cu130", "13.0"),
        "1 GPU is visible, but torch can't use it: driver 535.104.05, torch 2.13.0+cu130 with CUDA 13.0, which needs "
        "driver 580.65 or newer; install a newer driver or a torch wheel for an older CUDA, or use device cpu",
    ),
    "a CPU build and an old driver": (
        ("535.104.05", "2.13.0+cpu", ""),
        "1 GPU is visible, but torch can't use it: driver 535.104.05, torch 2.13.0+cpu with no CUDA: it is a CPU "
        "build; install a torch wheel for CUDA 12, or use device cpu",
    ),
    "a CPU build and a new driver": (("580.65.06", "2.13.0+cpu", ""), "install a torch wheel for CUDA 12 or 13, or "),
    "a CPU build and an ancient driver": (
        ("470.1", "2.13.0+cpu", ""),
        "install driver 525.60 or newer and a torch wheel for CUDA, or use",
    ),
    "torch's own reason": (
        ("580.65.06", "2.13.0+cu130", "13.0"),
        "which needs driver 580.65 or newer; torch says: Error 802: not yet initialized; check the GPUs with "
        "nvidia-smi, or use device cpu",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_gpus_that_torch_cannot_use(path: Path, case: str) -> None:
    (driver, *versions), message = UNUSABLE[case]
    write_nvidia_smi(path, driver=driver)
    said = why_unusable(["0"], *versions, "Error 802:\nnot yet initialized")
    assert message in said
    assert "\n" not in said


def test_a_container_without_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM sets the variable outside, and the container has neither the driver nor nvidia-smi."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert why_unusable(["0", "1"], "2.13.0+cu130", "13.0", "no driver") == (
        "2 GPUs are visible (CUDA_VISIBLE_DEVICES=0,1), but torch can't use them: no driver (nvidia-smi does not "
        "answer), torch 2.13.0+cu130 with CUDA 13.0, which needs driver 580.65 or newer; unset CUDA_VISIBLE_DEVICES if "
        "there is no GPU; otherwise install the driver, or start the container with its GPUs (apptainer --nv, docker "
        "--gpus all), or use device cpu"
    )


@pytest.mark.parametrize(
    ("capability", "architectures", "works"),
    [
        *[((7, 0), CUDA_12_6, True), ((7, 0), CUDA_13, False), ((6, 1), CUDA_12_6, True), ((7, 5), CUDA_13, True)],
        *[((8, 9), CUDA_13, True), ((10, 3), CUDA_13, True), ((12, 1), CUDA_13, True), ((13, 0), CUDA_13, True)],
        *[((11, 0), CUDA_13, False), ((10, 0), CUDA_12_6, False)],
        *[((9, 0), ["sm_90a"], True), ((9, 1), ["sm_90a"], False), ((10, 3), ["sm_100f"], True)],
        *[((7, 0), [], True), ((9, 0), ["gfx90a", "gfx942"], True)],  # not known, and ROCm's
    ],
)
def test_kernels_for_a_gpu(capability: tuple[int, int], architectures: list[str], works: bool) -> None:
    assert bool(why_no_kernels("a GPU", capability, "2.13.0", "13.0", architectures)) != works


def test_a_gpu_without_kernels_is_named() -> None:
    assert why_no_kernels("Tesla V100", (7, 0), "2.13.0+cu130", "13.0", CUDA_13) == (
        "Tesla V100 has compute capability 7.0, and torch 2.13.0+cu130 with CUDA 13.0 has kernels for 7.5, 8.0, 8.6, "
        "9.0, 10.0, 12.0; install a torch wheel for an older CUDA, or use device cpu"
    )
    assert "wheel for a newer CUDA" in why_no_kernels("B200", (10, 0), "2.13.0+cu126", "12.6", CUDA_12_6)


def test_gpus_that_are_too_old_for_a_cuda(path: Path) -> None:
    write_nvidia_smi(path, name="Tesla V100", capability="7.0")
    assert too_old_gpus("13.0") == ["Tesla V100 (7.0)"]
    assert too_old_gpus("12.6") == []
    write_nvidia_smi(path, name="Tesla T4", capability="7.5")
    assert too_old_gpus("13.0") == []
