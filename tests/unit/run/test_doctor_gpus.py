"""The doctor's line about GPUs, with a fake nvidia-smi."""

import sys
from pathlib import Path

import pytest

from fake_gpus import UUIDS, write_nvidia_smi
from seqmill.cli.main import main
from seqmill.run import doctor_gpus
from seqmill.run.doctor_gpus import describe_gpus


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_nothing_is_said_without_gpus() -> None:
    assert describe_gpus() == ""


CUDA_13 = ("2.13.0+cu130", "13.0")
SAID = {
    "they fit": (
        CUDA_13,
        "580.95.05",
        "9.0",
        "2 GPUs visible, driver 580.95.05; torch 2.13.0+cu130 with CUDA 13.0 fits",
    ),
    "an old driver": (
        CUDA_13,
        "535.104",
        "9.0",
        "driver 535.104, torch 2.13.0+cu130 with CUDA 13.0, which needs driver",
    ),
    "a CPU build": (("2.13.0+cpu", ""), "535.104", "9.0", "a CPU build; install a torch wheel for CUDA 12, or use"),
    "an old GPU": (
        CUDA_13,
        "580.95.05",
        "7.0",
        "; too old for torch 2.13.0+cu130 with CUDA 13.0: NVIDIA H100 80GB HBM3",
    ),
    "no torch": (None, "580.95.05", "9.0", "2 GPUs visible, driver 580.95.05; torch is not installed here"),
}


@pytest.mark.parametrize("case", SAID)
def test_gpus(path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    installed, driver, capability, said = SAID[case]
    write_nvidia_smi(path, UUIDS[:2], driver, capability=capability)
    monkeypatch.setattr(doctor_gpus, "installed_torch", lambda: installed)
    assert said in describe_gpus()
    assert "\n" not in describe_gpus()


def test_the_doctor_says_it_first(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_nvidia_smi(path)
    monkeypatch.setattr(sys, "argv", ["seqmill", "doctor", str(path)])
    with pytest.raises(SystemExit, match="1"):
        main()
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == describe_gpus() != ""
    assert last.startswith("next: ")
