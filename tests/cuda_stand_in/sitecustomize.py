"""Python imports this module where its folder is on PYTHONPATH: torch then has a CUDA device, which is the CPU.

For a rehearsal of programs that were written for a GPU: what they ask of torch.cuda gets an answer, and tensors "on
cuda" are on the CPU. Nothing is asynchronous, and Triton's kernels don't run.
"""

import atexit
import importlib.abc
import importlib.machinery
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

UUID = "00000000-1111-2222-3333-444444444444"
MEMORY = 8 << 30
TOKENS = 700  # for which the memory suffices when it is limited, or held by another process
HELD = Path(tempfile.gettempdir(), "stand-in-memory-is-held")


class PatchTorch(importlib.abc.MetaPathFinder):
    """Patches torch when it has been imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = execute_and_patch
        return spec


class Event:
    def __init__(self, **options: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.at - self.at)

    def synchronize(self) -> None:
        pass

    wait = synchronize

    def query(self) -> bool:
        return True


class Stream:
    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def wait_event(self, event: Event) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def wait_stream(self, stream: "Stream") -> None:
        pass

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def patch(torch: ModuleType) -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils._device import DeviceContext

    limit: list[float] = []

    def on_cpu(value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, str | torch.device) and str(value).startswith("cuda") else value

    class OnCpu(TorchFunctionMode):
        """Runs everything on the CPU, and ignores what the CPU has not: pinned memory and streams."""

        def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            name = getattr(function, "__name__", "")
            if function is torch.device:
                return function(*arguments, **(options or {}))
            if name in ("pin_memory", "cuda"):
                return arguments[0]
            if name == "empty" and isinstance(arguments[0], int) and arguments[0] > MEMORY // 2:
                HELD.touch()
                atexit.register(HELD.unlink)
                return torch.empty(arguments[0], dtype=torch.uint8)
            if name == "embedding" and (limit or HELD.exists()) and len(arguments[0]) > TOKENS:
                raise torch.OutOfMemoryError("CUDA out of memory")
            if name == "randn":  # of the GEMM peak
                arguments = tuple(min(size, 64) if isinstance(size, int) else size for size in arguments)
            options = {key: on_cpu(value) for key, value in (options or {}).items() if key != "pin_memory"}
            return function(*map(on_cpu, arguments), **options)

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Any:
            return super().__new__(cls, on_cpu(device))

    run = threading.Thread.run

    def run_on_cpu(thread: threading.Thread) -> None:
        with OnCpu():
            run(thread)

    threading.Thread.run = run_on_cpu
    OnCpu().__enter__()
    torch.Generator = Generator
    make = DeviceContext.__init__
    DeviceContext.__init__ = lambda self, device: make(self, on_cpu(device))
    torch.Tensor.record_stream = lambda tensor, stream: None
    torch.nn.Module.cuda = lambda module, device=None: module
    torch.version.cuda = "13.0"
    properties = SimpleNamespace(name="stand-in", uuid=UUID, total_memory=MEMORY, major=8, minor=0)
    properties.multi_processor_count = 1
    current = Stream()

    def flash_attention(q: Any, k: Any, v: Any, begins: Any, *others: Any, scale: float, **options: Any) -> Any:
        attend = torch.nn.functional.scaled_dot_product_attention
        parts = zip(*(t.transpose(0, 1).split(begins.diff().tolist(), 1) for t in (q, k, v)), strict=True)
        output = torch.cat([attend(*(t[None] for t in part), scale=scale)[0].transpose(0, 1) for part in parts])
        nothing = torch.empty(0)
        return output, nothing, nothing, nothing, nothing

    patch.library = torch.library.Library("aten", "IMPL")  # type: ignore[attr-defined]  # as long as this module
    patch.library.impl("_flash_attention_forward", flash_attention, "CPU")  # type: ignore[attr-defined]
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "stand-in",
        "get_device_capability": lambda device=None: (8, 0),
        "get_device_properties": lambda device=None: properties,
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: stream,
        "current_stream": lambda device=None: current,
        "default_stream": lambda device=None: current,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 1 << 20,
        "memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "set_per_process_memory_fraction": lambda fraction, device=None: limit.__setitem__(
            slice(None), [fraction] if fraction < 1 else []
        ),
        "_sleep": lambda cycles: None,
        "set_device": lambda device: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


sys.meta_path.insert(0, PatchTorch())
