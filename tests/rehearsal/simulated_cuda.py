"""A CUDA without a GPU: streams that run late and in an adversarial order, and memory that is poisoned once it is free.

`SimulatedCuda.torch` stands in for the module torch. Calls queue their work on streams; nothing runs until the host
waits, or at a whim of the seed. Then the stream of the highest priority goes on that need not wait for an event;
priorities are random and change now and then. So a missing wait shows as a wrong value.

Memory comes from two caching allocators, as in PyTorch. What they could hand out again is overwritten:
- device memory in the order of the stream that it was allocated on, or, after `record_stream`, once what those streams
  had queued when it was freed is done;
- pinned memory at once, or once the copies queued on other streams are done.
"""

import math
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch

POISON = 0x7E
DEVICE, PINNED, HOST = "device", "pinned", "host"
KNOWN_SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
CUDA = torch.device("cuda", 0)
VIEWS = {"__getitem__", "split", "chunk", "view"}
NO_OPS_FOR_THE_SAME_DTYPE = {"to", "float", "long", "int"}


class Race(AssertionError):
    """What a GPU would have punished by wrong numbers, a deadlock, or an illegal access."""


class SimulatedCuda:
    """One device. `errors` are those of queued work, `busy_waits` counts the waits that would have kept a core busy.

    An allocation asks `refuses` with its key, (where, thread), and its number among those; `capacity` is the device's,
    in bytes.
    """

    def __init__(
        self, seed: int, refuses: Callable[[tuple[str, str], int], bool] = lambda *_: False, capacity: float = math.inf
    ) -> None:
        self.lock, self.rng, self._local = threading.RLock(), random.Random(seed), threading.local()
        self.eagerness = self.rng.choice([0, 0, 0.1, 0.5])
        self.streams: list[Stream] = []
        self.default = Stream(self)
        self.errors: list[BaseException] = []
        self.busy_waits, self.allocations, self.live, self.peak = 0, Counter(), 0, 0
        self.refuses, self.capacity = refuses, capacity
        self.torch = SimulatedTorch(self)

    def current_stream(self, device: torch.device | None = None) -> "Stream":
        return getattr(self._local, "stream", self.default)

    @contextmanager
    def stream(self, stream: "Stream") -> Iterator[None]:
        before = self.current_stream()
        self._local.stream = stream
        try:
            yield
        finally:
            self._local.stream = before

    def step(self) -> bool:
        """Run one piece of queued work; return whether there was one that could run."""
        ready = [stream for stream in self.streams if stream.can_run()]
        if not ready:
            return False
        if self.rng.random() < 0.05:
            self.rng.choice(ready).priority = self.rng.random()
        max(ready, key=lambda stream: stream.priority).run_next()
        return True

    def wait(self, is_done: Callable[[], bool], asleep: bool) -> None:
        """Let the host wait until work is done, and no longer."""
        with self.lock:
            self.busy_waits += not asleep and not is_done()
            while not is_done():
                if not self.step():
                    raise Race("deadlock: the host waits, and no stream can run")

    def synchronize(self, device: torch.device | None = None) -> None:
        self.wait(lambda: not any(stream.queue for stream in self.streams), asleep=False)

    def empty_cache(self) -> None:
        """Do nothing: memory that waits for streams does not count as live."""

    def enqueue(self, work: Callable[[], object]) -> None:
        with self.lock:
            self.current_stream().queue.append(work)
            while self.rng.random() < self.eagerness and self.step():
                pass

    def allocate(self, where: str, shape: tuple[int, ...], dtype: torch.dtype) -> "SimulatedTensor":
        memory = Memory(self, where, math.prod(shape) * dtype.itemsize)
        with torch.inference_mode(False):  # to be written at any time
            memory.buffer = torch.full((memory.num_bytes,), POISON, dtype=torch.uint8)
            return SimulatedTensor(memory.buffer.view(dtype).view(shape), memory)

    def launch(self, kernel: Callable, args: tuple, kwargs: dict, out: "SimulatedTensor | None") -> None:
        """Queue a kernel that writes its result to `out`; None if it changes an argument."""

        target = None if out is None else out.data  # not the tensor: queued work keeps no memory

        def work() -> None:
            result = kernel(*args, **kwargs)
            if target is not None:
                if result.shape != target.shape:
                    raise Race(f"a kernel gave {tuple(result.shape)}, expected {tuple(target.shape)}")
                target.copy_(result)

        self.enqueue(work)

    def call(self, function: Callable, args: tuple, kwargs: dict) -> object:
        """Call a function of torch, now if it is about the host, later if about the device."""
        name, tensors = function.__name__, list(_tensors(args))
        is_cuda = any(isinstance(tensor, SimulatedTensor) and tensor.is_cuda for tensor in tensors)
        if device := kwargs.get("device"):
            is_cuda |= torch.device(device).type == "cuda"
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        if name in VIEWS and len(tensors) == 1:
            return self._wrapped(_data(function, args, kwargs), tensors[0].memory)
        if not is_cuda:
            return self._wrapped(_data(function, args, kwargs), None)
        if any(isinstance(tensor, torch.Tensor) or not tensor.is_cuda for tensor in tensors):
            raise Race(f"{name} of tensors on the device and on the host")
        if name in {"__setitem__", "__iadd__"} or (name.endswith("_") and not name.endswith("__")):
            self.launch(function, _unwrapped(args), kwargs, None)
            return args[0]
        shape, dtype = _shape_and_dtype(function, args, kwargs if tensors else {**kwargs, "device": "meta"})
        if name in NO_OPS_FOR_THE_SAME_DTYPE and dtype == args[0].dtype:
            return args[0]
        if name == "contiguous" and args[0].data.is_contiguous():
            return args[0]
        out = self.allocate(DEVICE, shape, dtype)
        self.launch(function, _unwrapped(args), kwargs, out)
        return out

    def _wrapped(self, result: object, memory: "Memory | None") -> object:
        if isinstance(result, tuple | list):
            return type(result)(self._wrapped(item, memory) for item in result)
        if not isinstance(result, torch.Tensor):
            return result
        return SimulatedTensor(result, memory or Memory(self, HOST, 0))


class Event:
    """Holds its last record, a list that says whether the stream has come there; without any, nothing waits for it."""

    def __init__(self, simulated: SimulatedCuda, blocking: bool = False) -> None:
        self.simulated, self.blocking, self.reached = simulated, blocking, [True]

    def synchronize(self) -> None:
        reached = self.reached
        self.simulated.wait(lambda: reached[0], self.blocking)


class Stream:
    """Work in order: callables, and records of events to wait for (lists)."""

    def __init__(self, simulated: SimulatedCuda, device: torch.device | None = None) -> None:
        self.simulated, self.queue, self.copies = simulated, deque(), 0
        with simulated.lock:
            self.priority = simulated.rng.random()
            simulated.streams.append(self)

    def can_run(self) -> bool:
        return bool(self.queue) and (callable(self.queue[0]) or self.queue[0][0])

    def run_next(self) -> None:
        work = self.queue.popleft()
        if callable(work):
            try:
                work()
            except Exception as error:  # such as an index that has been overwritten
                self.simulated.errors.append(error)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.simulated)
        event.reached = reached = [False]
        with self.simulated.lock:
            self.queue.append(lambda: reached.__setitem__(0, True))
        return event

    def wait_event(self, event: Event) -> None:
        with self.simulated.lock:
            self.queue.append(event.reached)


class Memory:
    """Memory that is given back when the last tensor or array over it is gone."""

    def __init__(self, simulated: SimulatedCuda, where: str, num_bytes: int) -> None:
        self.where = HOST  # in case that the allocation fails
        thread = "stager" if threading.current_thread().name == "stager" else "main"
        with simulated.lock:
            number = simulated.allocations[where, thread]
            simulated.allocations[where, thread] += 1
            if simulated.refuses((where, thread), number):
                if where == PINNED:
                    raise RuntimeError("CUDA error: out of memory (simulated)")
                raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
            if where == DEVICE:
                if simulated.live + num_bytes > simulated.capacity:
                    raise torch.OutOfMemoryError("CUDA out of memory (simulated, a full device)")
                simulated.live += num_bytes
                simulated.peak = max(simulated.peak, simulated.live)
        self.simulated, self.where, self.num_bytes = simulated, where, num_bytes
        self.stream, self.others = simulated.current_stream(), set()

    def __del__(self) -> None:
        if self.where == HOST:
            return
        with self.simulated.lock:
            self.simulated.live -= self.num_bytes if self.where == DEVICE else 0
            streams = self.others | {self.stream} if self.where == DEVICE else self.others
            poisoning = Poisoning(self.buffer, len(streams))
            for stream in streams:
                stream.queue.append(poisoning)
            if not streams:
                poisoning()


class Poisoning:
    """Overwrites memory that is free once the last of some streams has come there."""

    def __init__(self, buffer: torch.Tensor, streams: int) -> None:
        self._buffer, self._left = buffer, streams

    def __call__(self) -> None:
        self._left -= 1
        if self._left <= 0:
            self._buffer.fill_(POISON)


class Exported:
    """What a NumPy array holds on to."""

    def __init__(self, tensor: "SimulatedTensor") -> None:
        self.memory, self._data = tensor.memory, tensor.data
        self.__array_interface__ = tensor.data.numpy().__array_interface__


class SimulatedTensor:
    """A tensor on the device, in pinned memory, or in pageable memory; `data` has its values, once they have come."""

    def __init__(self, data: torch.Tensor, memory: Memory) -> None:
        self.data, self.memory, self._simulated = data, memory, memory.simulated
        self.shape, self.dtype = data.shape, data.dtype
        self.is_cuda = memory.where == DEVICE
        self.device = CUDA if self.is_cuda else torch.device("cpu")

    def __len__(self) -> int:
        return len(self.data)

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self._simulated.call(getattr(torch.Tensor, name), (self, *args), kwargs)

    def numpy(self) -> np.ndarray:
        if self.is_cuda:
            raise TypeError("can't convert a tensor on the device to NumPy")
        return np.asarray(Exported(self))

    def copy_(self, source: "SimulatedTensor | torch.Tensor", non_blocking: bool = False) -> "SimulatedTensor":
        if isinstance(source, SimulatedTensor) and self.is_cuda == source.is_cuda:
            self._simulated.call(torch.Tensor.copy_, (self, source), {})
        elif isinstance(source, SimulatedTensor):
            self._copy_between(source, non_blocking)
        else:
            self.data.copy_(source)
        return self

    def to(self, to: torch.dtype | torch.device, non_blocking: bool = False) -> "SimulatedTensor":
        if isinstance(to, torch.dtype):
            return self._simulated.call(torch.Tensor.to, (self, to), {})
        if (to.type == "cuda") == self.is_cuda:
            return self
        there = self._simulated.allocate(DEVICE if to.type == "cuda" else HOST, tuple(self.shape), self.dtype)
        there._copy_between(self, non_blocking)
        return there

    def pin_memory(self) -> "SimulatedTensor":
        return self._simulated.allocate(PINNED, tuple(self.shape), self.dtype).copy_(self)

    def cpu(self) -> "SimulatedTensor":
        return self.to(torch.device("cpu"))

    def _copy_between(self, source: "SimulatedTensor", non_blocking: bool) -> None:
        stream, target = self._simulated.current_stream(), self.data
        on_host = source if self.is_cuda else self
        # CUDA has read pageable memory when the call returns.
        data = source.data if on_host.memory.where == PINNED or source.is_cuda else source.data.clone()
        if on_host.memory.where == PINNED:
            on_host.memory.others.add(stream)
        self._simulated.enqueue(lambda: target.copy_(data))
        stream.copies += 1
        if not non_blocking or on_host.memory.where == HOST:
            earlier = sum(not isinstance(work, Poisoning) for work in stream.queue) > 1
            stream.record_event(done := Event(self._simulated, blocking=not earlier))
            done.synchronize()

    def record_stream(self, stream: Stream) -> None:
        self.memory.others.add(stream)


def _operator(name: str) -> Callable:
    return lambda self, *args: self._simulated.call(getattr(torch.Tensor, name), (self, *args), {})


for _name in ("getitem", "setitem", "add", "iadd", "sub", "mul", "rmul"):
    setattr(SimulatedTensor, f"__{_name}__", _operator(f"__{_name}__"))


class SimulatedTorch:
    """The module torch with this CUDA in it."""

    def __init__(self, simulated: SimulatedCuda) -> None:
        self._simulated = simulated
        self.cuda = SimpleNamespace(
            Stream=lambda device: Stream(simulated, device),
            Event=lambda blocking=False: Event(simulated, blocking),
            current_stream=simulated.current_stream,
            stream=simulated.stream,
            synchronize=simulated.synchronize,
            empty_cache=simulated.empty_cache,
        )

    def __getattr__(self, name: str) -> object:
        found = getattr(torch, name)
        if not callable(found) or isinstance(found, type):
            return found
        return lambda *args, **kwargs: self._simulated.call(found, args, kwargs)

    def empty(self, shape: tuple[int, ...], *, pin_memory: bool = False, **options: object) -> object:
        if pin_memory:
            return self._simulated.allocate(PINNED, tuple(shape), options["dtype"])
        return self._simulated.call(torch.empty, (shape,), options)


def apply(kernel: Callable[..., torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype, *tensors: object) -> object:
    """Apply a kernel to tensors, real or simulated: one piece of work that gives a tensor of this shape and dtype."""
    first = tensors[0]
    if isinstance(first, torch.Tensor):
        return kernel(*tensors)
    simulated = first._simulated
    if not first.is_cuda:
        return simulated._wrapped(kernel(*_unwrapped(tensors)), None)
    out = simulated.allocate(DEVICE, shape, dtype)
    simulated.launch(kernel, _unwrapped(tensors), {}, out)
    return out


def is_pinned(array: np.ndarray) -> bool:
    """Return whether an array is a view of pinned memory."""
    base: object = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return isinstance(base, Exported) and base.memory.where == PINNED


def _tensors(values: object) -> Iterator[object]:
    if isinstance(values, SimulatedTensor | torch.Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def _mapped(values: object, function: Callable) -> object:
    if isinstance(values, tuple | list):
        return type(values)(_mapped(value, function) for value in values)
    return function(values) if isinstance(values, SimulatedTensor) else values


def _unwrapped(values: object) -> object:
    return _mapped(values, lambda tensor: tensor.data)


def _shape_and_dtype(function: Callable, args: tuple, kwargs: dict) -> tuple[tuple[int, ...], torch.dtype]:
    """Return those of a function's result; remembered, because they take longer than the function."""

    def like(tensor: SimulatedTensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    key = f"{function} {_mapped(args, lambda tensor: (*tensor.shape, tensor.dtype))} {kwargs}"
    if key not in KNOWN_SHAPES:
        result = function(*_mapped(args, like), **kwargs)
        KNOWN_SHAPES[key] = tuple(result.shape), result.dtype
    return KNOWN_SHAPES[key]


def _data(function: Callable, args: tuple, kwargs: dict) -> object:
    return function(*_unwrapped(args), **kwargs)
