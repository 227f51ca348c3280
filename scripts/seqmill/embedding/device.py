"""The device and precision that a worker uses."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from seqmill.base import cuda, machine
from seqmill.base.machine import processor
from seqmill.base.words import in_one_line
from seqmill.errors import SeqmillError
from seqmill.model.float8 import FLOAT8, MULTIPLE, product, round_rows
from seqmill.model.out_of_memory import is_out_of_memory
from seqmill.spec.task import AUTO


def choose_device(device: str) -> torch.device:
    """Turn `auto`, `cpu` or `cuda` into a device.

    Raise a SeqmillError if `cuda` is set without a GPU, or if there are GPUs that torch can't use: a GPU's worker has
    few cores, so that the CPU would be slow without a word.
    """
    if device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        _require_kernels(chosen := torch.device("cuda"))
        return chosen
    if gpus := machine.visible_gpus():
        raise SeqmillError(cuda.why_unusable(gpus, str(torch.__version__), torch.version.cuda or "", _error_of_cuda()))
    if device == "cuda":
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        raise SeqmillError(
            f"device is cuda, but torch {torch.__version__} (built with {built}) sees no CUDA device "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); use device=auto or cpu"
        )
    return torch.device("cpu")


def _require_kernels(device: torch.device) -> None:
    """Raise a SeqmillError if the GPU is too old or too new for torch's kernels, which would fail one by one."""
    if not torch.version.cuda:  # ROCm names its architectures in another way
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    versions = str(torch.__version__), torch.version.cuda
    if reason := cuda.why_no_kernels(name, capability, *versions, torch.cuda.get_arch_list()):
        raise SeqmillError(reason)


def _error_of_cuda() -> str:
    """Return torch's reason why CUDA does not start."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # an AssertionError from a build without CUDA
        return str(error)
    return ""


def choose_precision(precision: str, device: torch.device) -> str:
    """Turn `auto` into bfloat16 if the device computes it natively, else into float32.

    A CPU needs AVX512-BF16, AMX or, on Arm, BF16: without them bfloat16 is slower than float32
    (docs/explanation/performance.md). CUDA needs compute capability 8.0. Raise a SeqmillError if it is float8 and the
    device can't compute that.
    """
    if precision == "float8" and (reason := _why_no_float8(device)):
        raise SeqmillError(f"precision float8 can't be used: {reason}; use precision bfloat16 or auto")
    if precision != AUTO:
        return precision
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = bool({"avx512_bf16", "amx_bf16", "bf16"} & processor()[1])
    return "bfloat16" if native else "float32"


@contextmanager
def float32_sums() -> Iterator[None]:
    """Keep sums of products on CUDA in float32 to their end, whatever the precision of the factors."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of the factors of matrix products in a precision, which is not auto."""
    dtype: torch.dtype = FLOAT8 if precision == "float8" else getattr(torch, precision)
    return dtype


def _why_no_float8(device: torch.device) -> str:
    """Return why a device can't compute in float8; empty if it can. Tries one product."""
    if device.type != "cuda":
        return f"it needs a CUDA device of compute capability 8.9 or later, and the device is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        name = torch.cuda.get_device_name(device)
        return f"it needs compute capability 8.9 or later, and {name} has {capability[0]}.{capability[1]}"
    if not hasattr(torch, "_scaled_mm"):
        return f"torch {torch.__version__} has no _scaled_mm"
    try:  # scales by rows depend on the GPU, CUDA, and cuBLAS
        rows = round_rows(torch.ones(MULTIPLE, MULTIPLE, device=device))
        product(rows, rows, None)
    except RuntimeError as error:
        if is_out_of_memory(error):  # it may pass
            raise
        name, reason = torch.cuda.get_device_name(device), in_one_line(str(error))
        return f"torch {torch.__version__} can't compute it on {name} ({reason})"
    return ""


def describe_device(device: torch.device) -> dict[str, str]:
    """Return the device's name, and a GPU's UUID, for the status JSON.

    A CPU's name ends with the instructions that PyTorch's kernels use (AVX2, AVX512 ...), on which rounding depends.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"device": properties.name, "device_uuid": str(properties.uuid)}
    return {"device": f"{processor()[0]} ({torch.backends.cpu.get_cpu_capability()})", "device_uuid": ""}


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak memory in bytes so far, of the process and on the GPU."""
    peak = {"peak_host_bytes": machine.peak_memory()}
    if device.type == "cuda":
        peak["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak
