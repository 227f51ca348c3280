"""The monitor samples or stays silent, and never disturbs the work; operations counted by hand; the GEMM peak."""

import sys
import threading
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seqmill.embedding import monitor as monitor_module
from seqmill.embedding.monitor import gemm_peak, gpu_use, monitor
from seqmill.model.weights import parameter_shapes
from seqmill.spec.architectures import model_flop
from seqmill.spec.models import DNABERT_MODELS, MODELS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
UUID = "4c2f0f6e-0000-1111-2222-333344445555"


class StandInNvml(ModuleType):
    """Stands in for NVML: one GPU whose used memory grows with every sample, and that may vanish."""

    def __init__(self, uuid: str = f"GPU-{UUID}", looks: int = 1000) -> None:
        super().__init__("pynvml")
        self.uuid, self.looks, self.seen = uuid, looks, 0

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self.uuid:
            raise RuntimeError("Not Found")
        return "handle"

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        assert handle == "handle"
        self.seen += 1
        if self.seen > self.looks:
            raise RuntimeError("GPU is lost")
        return 350_500  # milliwatts

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(gpu=90 if self.seen % 2 else 96, memory=40)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(used=self.seen * 1_000_000, total=80_000_000_000)


def watched(monkeypatch: pytest.MonkeyPatch, nvml: StandInNvml, wanted: int) -> dict[str, float]:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    with monitor(CUDA, seconds=0.001) as found:
        end = time.monotonic() + 10
        while len(found) < wanted and time.monotonic() < end:
            time.sleep(0.001)
    return gpu_use(found)


def test_the_summary_has_the_units_of_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = StandInNvml()
    summary = watched(monkeypatch, nvml, wanted=4)
    assert summary["gpu_samples"] >= 4
    assert 90 <= summary["gpu_utilization_mean"] <= 96
    assert summary["gpu_power_watts_mean"] == 350.5
    assert summary["gpu_memory_bytes_max"] == nvml.seen * 1_000_000
    assert "monitor" not in [thread.name for thread in threading.enumerate()]


def test_a_gpu_that_stops_answering_ends_only_the_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = StandInNvml(looks=3)  # one trial, two samples
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    with monitor(CUDA, seconds=0.001) as found:
        end = time.monotonic() + 10
        while nvml.seen < 4 and time.monotonic() < end:
            time.sleep(0.001)
    assert gpu_use(found)["gpu_samples"] == 2


def test_a_mig_instance_is_not_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(monkeypatch, StandInNvml(uuid="MIG-" + UUID), wanted=0) == {}


def test_without_the_package_there_are_no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # makes the import fail
    with monitor(CUDA, seconds=0.001) as found:
        pass
    assert gpu_use(found) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_without_a_gpu_there_are_no_samples(device: torch.device) -> None:
    with monitor(device, seconds=0.001) as found:
        pass
    assert gpu_use(found) == {}


def test_an_error_in_the_work_passes_through_and_ends_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", StandInNvml())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    with pytest.raises(ValueError, match="of the work"), monitor(CUDA, seconds=0.001):
        raise ValueError("of the work")
    assert "monitor" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("name", [*MODELS, *DNABERT_MODELS])
def test_operations_count_the_matrices_and_attention(name: str) -> None:
    architecture = (MODELS | DNABERT_MODELS)[name]
    lengths = np.array([1024, 350, 3])
    matrices = [s for key, s in parameter_shapes(architecture).items() if key.startswith("layers.") and len(s) == 2]
    expected = 2 * sum(rows * columns for rows, columns in matrices) * lengths.sum()
    scores_and_values = 2 * 2 * architecture.num_heads * architecture.head_dim * (lengths**2).sum()
    expected += architecture.num_layers * scores_and_values
    assert model_flop(architecture, lengths) == pytest.approx(float(expected), rel=1e-12)


def test_the_gemm_peak_is_plausible() -> None:
    peak = gemm_peak(CPU, torch.float32)
    assert 1e8 < peak < 1e15


def test_the_peak_is_measured_with_float32_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the runner computes; products with reduced sums would be a higher peak than the model can reach."""
    found, matmul = set(), torch.backends.cuda.matmul

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: object, types: object, arguments: tuple = (), options: dict = {}) -> Any:  # noqa: B006
            if function is torch.ops.aten.mm.default:
                found.add(
                    (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction)
                )
            return function(*arguments, **options)

    monkeypatch.setattr(monitor_module, "PEAK_SECONDS", 0.0)
    with Watch():
        gemm_peak(CPU, torch.bfloat16)
    assert found == {(False, False)}
    assert matmul.allow_bf16_reduced_precision_reduction  # torch's default is back
