"""How busy the device is while a shard is computed, and its peak speed."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import torch

from seqmill.embedding.device import float32_sums
from seqmill.model.float8 import FLOAT8, product, round_rows

SAMPLE_SECONDS = 1.0
PEAK_SECONDS = 0.15  # of measuring, after a product to warm up
GPU_PRODUCTS = 4  # per measurement, so that waiting for the device hardly counts

Sample = tuple[float, int, float]  # utilization in percent, bytes of memory used, watts


@contextmanager
def monitor(device: torch.device, seconds: float = SAMPLE_SECONDS) -> Iterator[list[Sample]]:
    """Sample a GPU every `seconds` in a thread while the block runs; yield the list of samples.

    There are fewer samples or none without a GPU or NVML, or if NVML stops answering; the block never fails for it.
    """
    samples: list[Sample] = []
    ended, sample = threading.Event(), _nvml_sampler(device)

    def watch() -> None:
        with suppress(Exception):  # whatever the driver raises: figures are worth less than the work
            while sample and not ended.wait(seconds):
                samples.append(sample())

    thread = threading.Thread(target=watch, name="monitor", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join(timeout=2)  # a driver that does not answer must not delay the end


def gpu_use(samples: Sequence[Sample]) -> dict[str, float]:
    """Return mean utilization (percent), peak memory (bytes) and mean power (watts); {} without samples.

    Utilization is NVML's: the share of time in which at least one kernel ran. Memory is that of all processes on it.
    """
    if not samples:
        return {}
    utilization, memory, power = zip(*samples, strict=True)
    return {
        "gpu_utilization_mean": round(sum(utilization) / len(utilization), 1),
        "gpu_memory_bytes_max": max(memory),
        "gpu_power_watts_mean": round(sum(power) / len(power), 1),
        "gpu_samples": len(power),
    }


def _nvml_sampler(device: torch.device) -> Callable[[], Sample] | None:
    """Return a function that samples a device; None for a CPU, a part of a GPU (MIG), or without NVML."""
    if device.type != "cuda":
        return None
    try:
        import pynvml as nvml

        # By UUID, because NVML numbers GPUs without regard to CUDA_VISIBLE_DEVICES. It finds no MIG instance.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        nvml.nvmlInit()
        gpu = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")

        def sample() -> Sample:
            watts = nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3
            return nvml.nvmlDeviceGetUtilizationRates(gpu).gpu, nvml.nvmlDeviceGetMemoryInfo(gpu).used, watts

        sample()
    except Exception:  # no package, no library, no such GPU, no permission
        return None
    return sample


def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best FLOP/s of large matrix products, summed as the runner's, within PEAK_SECONDS.

    A CPU uses torch's threads. float8 is rounded before the time is taken.
    """
    on_gpu = device.type == "cuda"
    size = 1024 if not on_gpu else 8192 if dtype.itemsize <= 2 else 4096
    x = torch.randn(size, size, device=device)
    if dtype == FLOAT8:
        rows = round_rows(x)
        multiply = partial(product, rows, rows, None)
    else:
        x = x.to(dtype)
        multiply = partial(torch.mm, x, x)

    def products(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            multiply()
        if on_gpu:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / count

    with float32_sums():
        products(1)
        end = time.perf_counter() + PEAK_SECONDS
        best = products(1)
        while time.perf_counter() < end:
            best = min(best, products(GPU_PRODUCTS if on_gpu else 1))
    return 2 * size**3 / best
