"""How busy the device is while a shard is computed, and what it could do at most."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

SAMPLE_SECONDS = 1.0
PEAK_SECONDS = 0.15  # of measuring, after a product to warm up
GPU_PRODUCTS = 4  # between two looks at the clock, so that waiting for the device does not count

Sample = tuple[float, int, float]  # utilization in percent, bytes of memory used, watts


class Monitor:
    """Samples of a GPU, taken while the work ran."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []

    def summary(self) -> dict[str, float]:
        """Return the mean utilization (percent), most memory (bytes) and mean power (watts); {} without samples.

        Utilization is NVML's: the share of time in which at least one kernel ran. Memory is all that is
        used on the GPU, by any process.
        """
        if not self.samples:
            return {}
        utilization, memory, power = zip(*self.samples, strict=True)
        return {
            "gpu_utilization_mean": round(sum(utilization) / len(utilization), 1),
            "gpu_memory_bytes_max": max(memory),
            "gpu_power_watts_mean": round(sum(power) / len(power), 1),
            "gpu_samples": len(self.samples),
        }


@contextmanager
def monitor(device: torch.device, seconds: float = SAMPLE_SECONDS) -> Iterator[Monitor]:
    """Sample a GPU every so many seconds while the block runs, from a thread of its own.

    Without a GPU, or where NVML can't be had or stops answering, there are no or fewer samples: the
    block never fails for it.
    """
    result = Monitor()
    sample = _nvml_sampler(device)
    ended = threading.Event()

    def watch(sample: Callable[[], Sample]) -> None:
        while not ended.wait(seconds):
            try:
                result.samples.append(sample())
            except Exception:  # whatever the driver has: figures are worth less than the work
                return

    if sample is None:
        yield result
        return
    thread = threading.Thread(target=watch, args=(sample,), name="monitor", daemon=True)
    thread.start()
    try:
        yield result
    finally:
        ended.set()
        thread.join(timeout=2)  # a driver that does not answer must not hold up the end


def _nvml_sampler(device: torch.device) -> Callable[[], Sample] | None:
    """Return a function that samples a device; None on a CPU, on a part of a GPU (MIG), or without NVML."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        # By UUID, because NVML's numbers are not those of CUDA_VISIBLE_DEVICES. A MIG instance's is not found.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")

        def sample() -> Sample:
            milliwatts = pynvml.nvmlDeviceGetPowerUsage(gpu)
            return (
                pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
                pynvml.nvmlDeviceGetMemoryInfo(gpu).used,
                milliwatts / 1e3,
            )

        sample()
    except Exception:  # no package, no library, no such GPU, no permission
        return None
    return sample


def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product, the best of what fits into 0.15 s; torch's threads on a CPU."""
    on_gpu = device.type == "cuda"
    size = 1024 if not on_gpu else 8192 if dtype.itemsize == 2 else 4096
    x = torch.randn(size, size, device=device).to(dtype)

    def products(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            x @ x
        if on_gpu:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / count

    products(1)
    end = time.perf_counter() + PEAK_SECONDS
    best = products(1)
    while time.perf_counter() < end:
        best = min(best, products(GPU_PRODUCTS if on_gpu else 1))
    return 2 * size**3 / best
