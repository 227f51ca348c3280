"""A CUDA of tensors without values: it checks shapes, dtypes, and devices, and counts launches, bytes, and waits.

PyTorch's FakeTensorMode knows what each operation returns and on which device. Triton kernels are recorded where their
Python wrappers launch them, with all arguments, so `compile_launches.py` can compile exactly these.
"""

import ctypes
import functools
import importlib
import inspect
import math
import pkgutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from seqmill.model import kernels
from seqmill.model.kernels import fused, gemm_triton

DEVICE = torch.device("cuda", 0)
# Arguments that a kernel reads and writes in place, and the share of their bytes that it touches.
IN_PLACE = {("fused", "_norm", "x_start"): 1.0, ("fused", "_rotate", "qkv_start"): 2 / 3}
IN_PLACE |= {("float8_triton", "_norm", "x_start"): 1.0}
PRODUCTS = ("mm", "addmm", "linear", "_scaled_mm")


@dataclass(frozen=True)
class Launch:
    """A launch of a Triton kernel: what the compiler needs to know of each argument, and the options."""

    module: str  # below seqmill.model.kernels
    kernel: str
    arguments: tuple[tuple[str, Any], ...]  # name and value; tensors as ("tensor", dtype)
    options: tuple[tuple[str, Any], ...]


@dataclass
class Counted:
    """What a run has launched: by kernel, bytes moved, and FLOP of matrix products."""

    launches: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    flop: int = 0
    triton: list[Launch] = field(default_factory=list)

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]

    def add(self, name: str, num_bytes: float) -> None:
        self.launches[name] += 1
        self.bytes[name] += round(num_bytes)


class HostWaits(AssertionError):
    """An operation makes the host wait for the device."""


class Counting(TorchDispatchMode):
    """Counts PyTorch's operations on the device; raises `HostWaits` for a copy between host and device."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function._overloadpacket.__name__
        if name == "_pin_memory":
            pinned = torch.empty_like(args[0])
            pinned.is_pinned_memory = True
            return pinned
        result = function(*args, **kwargs)
        inputs = tensors_in((args, tuple(kwargs.values())))
        outputs = tensors_in(result)
        if name in ("_to_copy", "copy_") and {t.device.type for t in (*inputs, *outputs)} == {"cpu", "cuda"}:
            through = next(tensor for tensor in (*inputs, *outputs) if tensor.device.type == "cpu")
            if not getattr(through, "is_pinned_memory", False) or not (kwargs.get("non_blocking") or True in args):
                raise HostWaits(f"{function}: a copy between host and device")
        returns = function._schema.returns
        is_view = any(value.alias_info and not value.alias_info.is_write for value in returns)
        on_device = [tensor for tensor in outputs if tensor.is_cuda and tensor.numel()]
        if is_view or not on_device or name in ("empty", "empty_like", "empty_strided", "_unsafe_view"):
            return result
        read = {id(tensor): tensor for tensor in inputs}.values()  # a tensor changed in place is read and written
        self.counted.add(name, sum(tensor.nbytes for tensor in (*read, *on_device)))
        if name in PRODUCTS:
            depth = next(tensor.shape[1] for tensor in inputs if tensor.dim() == 2)
            self.counted.flop += 2 * outputs[0].numel() * depth
        return result


def tensors_in(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in tensors_in(value)]
    return []


@contextmanager
def fake_cuda(patch: pytest.MonkeyPatch, capability: int = 90) -> Iterator[Counted]:
    """Make and use tensors on `DEVICE` within the block; `capability` is 90 for compute capability 9.0."""
    _allow_cuda()
    counted = Counted()
    patch.setattr(JITFunction, "run", functools.partialmethod(_record, counted))
    major, minor = divmod(capability, 10)
    gpu = SimpleNamespace(major=major, minor=minor, multi_processor_count=132)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
    patch.setattr(FakeTensor, "data_ptr", lambda tensor: tensor.storage_offset() * tensor.element_size(), raising=False)
    patch.setattr(torch.cuda, "synchronize", lambda device: None)
    for cached in (fused.available, gemm_triton._gpu):
        cached.cache_clear()
    try:
        with FakeTensorMode(), Counting(counted):
            fused.available(torch.device(DEVICE.type))  # as the package asks
            counted.clear()
            yield counted
    finally:
        for cached in (fused.available, gemm_triton._gpu):
            cached.cache_clear()


@functools.cache
def _allow_cuda() -> None:
    """Let a build of PyTorch for CPUs enter a CUDA device, which then does nothing."""
    if torch.version.cuda:
        pytest.skip("this PyTorch has a CUDA of its own")
    source, root = Path(__file__).with_name("cuda_guard.cpp"), Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "guard.so")
        options = ["-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
        subprocess.run(["g++", str(source), "-o", str(library), *options], check=True)
        ctypes.CDLL(str(library))


def _record(kernel: JITFunction, counted: Counted, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Take the place of a launch: check what a launch relies on, and note it."""
    module, name = kernel.fn.__module__.rpartition(".")[2], kernel.fn.__name__
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {key: value for key, value in kwargs.items() if key in kernel.arg_names}
    options = {key: value for key, value in kwargs.items() if key not in kernel.arg_names}
    assert values.keys() == set(kernel.arg_names), f"{name}: arguments are missing"
    assert all(isinstance(size, int) and size > 0 for size in grid), f"{name}: grid {grid}"
    assert math.prod(grid) < 2**31
    assert all(size < 2**16 for size in grid[1:]), f"{name}: grid {grid}"
    num_bytes = 0.0
    for argument, value in values.items():
        if isinstance(value, TensorDescriptor):
            value = value.base
        if isinstance(value, torch.Tensor):
            assert value.device == DEVICE, f"{name}: {argument} is on {value.device}"
            assert value.is_contiguous(), f"{name}: {argument} is not contiguous"
            assert value.data_ptr() % 16 == 0, f"{name}: {argument} does not begin at 16 bytes"
            num_bytes += value.nbytes * 2 * IN_PLACE.get((module, name, argument), 0.5)
    if (module, name) == ("gemm_triton", "_product"):
        counted.flop += 2 * values["output_start"].numel() * values["depth"]
    described = tuple((argument, _described(value)) for argument, value in values.items())
    counted.triton.append(Launch(module, name, described, tuple(sorted(options.items()))))
    counted.add(f"{module}.{name}", num_bytes)


def _described(value: Any) -> Any:
    if isinstance(value, TensorDescriptor):
        return "descriptor", str(value.base.dtype).removeprefix("torch."), tuple(value.shape), tuple(value.block_shape)
    if isinstance(value, torch.Tensor):
        return "tensor", str(value.dtype).removeprefix("torch.")
    return value


def launched_kernels() -> set[str]:
    """Return the Triton kernels that the package launches, as module.kernel."""
    found = set()
    for info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        source = inspect.getsource(module)
        own = (name for name, value in vars(module).items() if isinstance(value, JITFunction))
        found |= {f"{info.name}.{name}" for name in own if f" {name}[" in source}
    return found
