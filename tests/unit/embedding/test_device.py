"""Devices: which GPUs a process may use, and what happens without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import seqmill
from fake_gpus import write_nvidia_smi as write_fake
from pipeline import MODEL, SCRIPTS
from seqmill.base.machine import processor, visible_gpus
from seqmill.embedding import device as devices
from seqmill.embedding.device import choose_device, choose_precision, describe_device, dtype_of, peak_memory
from seqmill.errors import SeqmillError
from seqmill.spec.task import AUTO, PRECISIONS

CPU = torch.device("cpu")
LISTING = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5a8f8f1e-0001-0002-0003-000000000000)
  MIG 1g.5gb      Device  0: (UUID: MIG-5a8f8f1e-0001-0002-0003-000000000001)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-5a8f8f1e-0001-0002-0003-000000000002)
"""


@pytest.fixture(autouse=True)
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restricts PATH to the test's folder and unsets CUDA_VISIBLE_DEVICES."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def write_nvidia_smi(folder: Path, script: str) -> Path:
    """Write a program that saves its arguments in a file `asked` and then runs the script."""
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" > "{folder}/asked"\n{script}\n')
    program.chmod(0o755)
    return folder / "asked"


def listing(text: str) -> str:
    return "".join(f"echo '{line}'\n" for line in text.splitlines())


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("", []),
        (" ", []),
        ("0", ["0"]),
        ("0,1", ["0", "1"]),
        ("1, 0", ["1", "0"]),
        ("3,1,2", ["3", "1", "2"]),
        ("GPU-5a8f,GPU-77c1", ["GPU-5a8f", "GPU-77c1"]),
        ("MIG-5a8f", ["MIG-5a8f"]),
        ("-1", []),
        ("-1,0", []),
        ("0,-1,1", ["0"]),
        ("0,,1", ["0"]),
    ],
)
def test_cuda_visible_devices_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str, expected: list[str]
) -> None:
    asked = write_nvidia_smi(tmp_path, listing(LISTING))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert visible_gpus() == expected
    assert not asked.exists()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (listing(LISTING), ["0", "1"]),
        (listing(LISTING.splitlines()[0]), ["0"]),
        ("true", []),
        (listing("No devices found."), []),
        (listing(LISTING) + "exit 9", []),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9", []),
    ],
    ids=["two", "one", "silent", "none", "listing and failure", "no driver"],
)
def test_nvidia_smi_is_used_if_the_variable_is_unset(tmp_path: Path, script: str, expected: list[str]) -> None:
    asked = write_nvidia_smi(tmp_path, script)
    assert visible_gpus() == expected
    assert asked.read_text() == "-L\n"


def test_no_nvidia_smi() -> None:
    assert visible_gpus() == []


def test_an_nvidia_smi_that_cannot_run(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    assert visible_gpus() == []


def test_cuda_without_a_device() -> None:
    """In a separate process, because CUDA reads its variable only once."""
    program = (
        "from seqmill.embedding.device import choose_device\n"
        "from seqmill.errors import SeqmillError\n"
        "print(choose_device('auto'), choose_device('cpu'))\n"
        "try:\n"
        "    print(choose_device('cuda'))\n"
        "except SeqmillError as error:\n"
        "    print(error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3] / "scripts",
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        check=True,
    )
    devices, message = answer.stdout.splitlines()
    assert devices == "cpu cpu"
    assert message.startswith(f"device is cuda, but torch {torch.__version__}")
    assert "sees no CUDA device (CUDA_VISIBLE_DEVICES=-1)" in message
    assert "use device=auto or cpu" in message


def test_the_cpu_is_chosen_on_request(tmp_path: Path) -> None:
    write_fake(tmp_path)
    assert choose_device("cpu") == CPU


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a wheel for CUDA 13 that finds no usable GPU; also on a machine that has one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def fail() -> None:
        raise RuntimeError("Unexpected error from cudaGetDeviceCount()\nError 802: system not yet initialized")

    monkeypatch.setattr(torch.cuda, "init", fail)


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_gpus_that_torch_cannot_use_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    write_fake(tmp_path, driver="535.104.05")
    with pytest.raises(
        SeqmillError, match=r"driver 535\.104\.05, torch \S+ with CUDA 13\.0, which needs driver 580\.65"
    ):
        choose_device(device)
    write_fake(tmp_path)
    with pytest.raises(SeqmillError, match=r"torch says: Unexpected error .* Error 802: system not yet initialized"):
        choose_device(device)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if device == "auto":
        assert choose_device(device) == CPU


@pytest.mark.skipif(bool(torch.version.cuda), reason="torch has CUDA")
def test_a_cpu_build_beside_a_gpu_is_an_error_in_python_too(tmp_path: Path) -> None:
    write_fake(tmp_path)
    with pytest.raises(
        SeqmillError, match=r"1 GPU is visible, but torch can't use it: driver 580\.95\.05, .* CPU build"
    ):
        seqmill.load(MODEL)
    with pytest.raises(SeqmillError, match=r"; install a torch wheel for CUDA 12 or 13, or use device cpu$"):
        choose_device("auto")
    assert seqmill.load(MODEL, device="cpu")


def test_a_gpu_that_is_too_old_for_torch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls it available, and then each kernel fails."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "compute_90"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    for device in ("auto", "cuda"):
        with pytest.raises(
            SeqmillError, match=r"Tesla V100 has compute capability 7\.0, and torch .* 7\.5, 8\.0, 9\.0; "
        ):
            choose_device(device)
    assert choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert choose_device("auto") == torch.device("cuda")


def test_precision_on_a_cpu() -> None:
    assert choose_precision("float32", CPU) == "float32"
    assert choose_precision("bfloat16", CPU) == "bfloat16"
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    assert choose_precision("auto", CPU) == ("bfloat16" if native else "float32")


def refusal_of_float8(device: str) -> str:
    with pytest.raises(SeqmillError) as caught:
        choose_precision("float8", torch.device(device))
    return str(caught.value)


def test_float8_on_a_cpu_is_refused() -> None:
    assert refusal_of_float8("cpu") == (
        "precision float8 can't be used: it needs a CUDA device of compute capability 8.9 or later, and the device is "
        "cpu; use precision bfloat16 or auto"
    )


def refuse_rows(*_: object) -> None:
    raise RuntimeError("Rowwise scaling is not supported")


def test_float8_needs_compute_capability_8_9(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    for capability in ((7, 5), (8, 0), (8, 6)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert refusal_of_float8("cuda") == (
            "precision float8 can't be used: it needs compute capability 8.9 or later, and NVIDIA A100 has "
            f"{capability[0]}.{capability[1]}; use precision bfloat16 or auto"
        )
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(shape))  # the product to try is one on the CPU
    for capability in ((8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert choose_precision("float8", torch.device("cuda")) == "float8"
        assert choose_precision("auto", torch.device("cuda")) == "bfloat16"
    with monkeypatch.context() as patch:
        patch.setattr(devices, "product", refuse_rows)
        assert "can't compute it on NVIDIA A100 (Rowwise scaling is not supported)" in refusal_of_float8("cuda")
    monkeypatch.delattr(torch, "_scaled_mm")
    assert f"torch {torch.__version__} has no _scaled_mm" in refusal_of_float8("cuda")


def test_every_precision_has_a_dtype() -> None:
    found = {precision: dtype_of(precision) for precision in PRECISIONS if precision != AUTO}
    assert found["float8"] == torch.float8_e4m3fn
    assert found["bfloat16"] == torch.bfloat16
    assert len(set(found.values())) == len(found)


def test_the_cpu_is_described() -> None:
    description = describe_device(CPU)
    assert description["device"]
    assert description["device_uuid"] == ""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_cpus_instructions_are_named(capability: str) -> None:
    """Rounding depends on them, and so do float32 results."""
    code = "import torch; from seqmill.embedding.device import describe_device"
    code += "; print(describe_device(torch.device('cpu'))['device'])"
    code += "; print(torch.backends.cpu.get_cpu_capability())"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    name, used = done.stdout.splitlines()
    assert name == f"{processor()[0]} ({used})"


def test_peak_memory_on_a_cpu() -> None:
    peak = peak_memory(CPU)
    assert peak.keys() == {"peak_host_bytes"}
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 64 << 20 < peak["peak_host_bytes"] < memory  # torch alone takes more than that
