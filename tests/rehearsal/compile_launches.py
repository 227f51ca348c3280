"""Compile launches that fake_cuda recorded, for a GPU that need not exist: compile_launches.py LAUNCHES CAPABILITY OUT.

It runs in a process of its own, so another version of Triton can come first on PYTHONPATH.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor

BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
COUNTED = ("LDL", "STL", "HMMA", "HGMMA", "UTCHMMA")


def argument(described: Any) -> Any:
    """Return the argument of a launch, without memory."""
    if not isinstance(described, list):
        return described
    kind, dtype, *shapes = described
    base = MockTensor(getattr(torch, dtype))
    if kind == "tensor":
        return base
    shape, block = shapes
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return TensorDescriptor(base, shape, strides, block)


def compiled(launch: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the registers, bytes of stack and shared memory, warps, and counted instructions of a kernel."""
    module = importlib.import_module(f"seqmill.model.kernels.{launch['module']}")
    kernel = getattr(module, launch["kernel"])
    arguments = {name: argument(value) for name, value in launch["arguments"]}
    done = kernel.warmup(*arguments.values(), grid=(1,), **dict(launch["options"]))
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(done.asm["cubin"])
    usage, code = (dumped(cubin, what) for what in ("--dump-resource-usage", "--dump-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in COUNTED}
    resources = {"registers": int(found[1]), "stack": int(found[2]), "shared": done.metadata.shared}
    return {**resources, "warps": done.metadata.num_warps, "dots": "tt.dot" in done.asm["ttir"], **counts}


def dumped(cubin: Path, what: str) -> str:
    return subprocess.run([BINARIES / "cuobjdump", what, cubin], capture_output=True, text=True, check=True).stdout


def main() -> None:
    launches, capability, output = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    target = GPUTarget("cuda", capability, 32)
    driver = {"get_current_target": lambda: target, "get_current_device": lambda: 0}
    triton.runtime.driver.set_active(SimpleNamespace(**driver, get_current_stream=lambda device: 0))
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        found = [compiled(launch, Path(folder)) for launch in json.loads(launches.read_text())]
    output.write_text(json.dumps({"triton": triton.__version__, "kernels": found}))


if __name__ == "__main__":
    main()
