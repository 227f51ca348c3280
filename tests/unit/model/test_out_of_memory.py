"""Failed allocations are recognized by type or text, and never taken for a kernel that does not run."""

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from seqmill.model.kernels import biased_triton, fused
from seqmill.model.out_of_memory import is_out_of_memory, unless_out_of_memory

# As PyTorch 2.13 and Triton 3.7 report them.
FAILED_ALLOCATIONS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("could not create a memory object"),
    MemoryError(),
]
OTHER_ERRORS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    ValueError("shapes differ"),
]


@pytest.mark.parametrize("error", FAILED_ALLOCATIONS, ids=str)
def test_a_failed_allocation_is_recognized(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert unless_out_of_memory(raising(error)) is None


@pytest.mark.parametrize("error", OTHER_ERRORS, ids=str)
def test_another_error_is_raised(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)):
        unless_out_of_memory(raising(error))


def test_a_kernel_too_large_for_the_gpu_is_another_error() -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    for name in ("shared memory", "tensor memory", "threads"):
        assert not is_out_of_memory(errors.OutOfResources(300_000, 232_448, name))


def test_after_a_failed_allocation_nothing_is_held() -> None:
    class Tensor:
        pass

    held = []

    def fail() -> None:
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        raise MemoryError

    gc.disable()
    try:
        assert unless_out_of_memory(fail) is None
        assert held[0]() is None
    finally:
        gc.enable()


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


class Failing:
    """A torch whose allocations fail."""

    def __init__(self, error: Exception) -> None:
        self.ones = self.tensor = raising(error)

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


@pytest.mark.parametrize("module", [fused, biased_triton], ids=["fused", "biased_triton"])
def test_a_lack_of_memory_that_passes_does_not_rule_out_the_kernels(
    module: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise one full moment of the GPU would leave the whole run without them."""
    arguments = (torch.device("cuda", 7),) if module is fused else (torch.device("cuda", 7), torch.float16, 64, True)
    check = fused.available if module is fused else biased_triton.why_not
    monkeypatch.setattr(module, "triton", SimpleNamespace())
    monkeypatch.setattr(module, "torch", Failing(RuntimeError("Triton Error [CUDA]: out of memory")))
    check.cache_clear()
    for _ in range(2):  # not kept either
        with pytest.raises(RuntimeError, match="out of memory"):
            check(*arguments)
    monkeypatch.setattr(module, "torch", Failing(RuntimeError("no C compiler")))
    assert check(*arguments) == (False if module is fused else "Triton's kernel does not run (no C compiler)")
    check.cache_clear()
