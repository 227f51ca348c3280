"""Seeded damage to files. The cases run in child processes, so a crash or a hang is one failed case."""

import json
import os
import random
import re
import resource
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import h5py

CASE_SECONDS = 20
CASE_MEMORY = 8 << 30  # address space on top of the parent's, so that an absurd size raises MemoryError


def failures(number: int, attempt: Callable[[int], object]) -> str:
    """Call `attempt` with the seeds 0 to `number` - 1 in child processes; return the errors, or "" if none."""
    wrong: list[str] = []
    seed = 0
    while seed < number:
        seed, said = _one_child(seed, number, attempt)
        wrong += said
    return "\n".join([f"{len(wrong)} of {number} cases went wrong", *wrong]) if wrong else ""


def _one_child(first: int, number: int, attempt: Callable[[int], object]) -> tuple[int, list[str]]:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _be_child(first, number, attempt, writer)
    os.close(writer)
    reached, wrong = first, []
    with os.fdopen(reader, encoding="utf-8") as lines:
        for line in lines:
            reached, error = json.loads(line)
            if error:
                wrong.append(f"seed {reached}: {error}")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        wrong.append(f"seed {reached}: the process was killed by {name} (SIGALRM: after {CASE_SECONDS} s)")
        return reached + 1, wrong
    assert os.WEXITSTATUS(status) == 0
    return number, wrong


def _be_child(first: int, number: int, attempt: Callable[[int], object], writer: int) -> None:
    """Report the seed before each case and any error after it; never return."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + CASE_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for seed in range(first, number):
            os.write(writer, f"{json.dumps([seed, ''])}\n".encode())
            signal.alarm(CASE_SECONDS)
            try:
                attempt(seed)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{type(error).__name__}: {str(error)[:500]} ({Path(where.filename).name}:{where.lineno})"
                os.write(writer, f"{json.dumps([seed, text])}\n".encode())
            signal.alarm(0)
        code = 0
    finally:
        os._exit(code)


KINDS = ("bit", "bit", "bit", "byte", "random", "zero", "ones", "truncate", "insert", "remove", "copy")


def damaged(data: bytes, random_: random.Random, likely: list[range], share: float = 0.8) -> bytes:
    """Return `data` damaged in one to three places, each with probability `share` in a `likely` range."""
    for _ in range(random_.choice([1, 1, 1, 2, 3])):
        inside = random_.choice(likely) if likely and random_.random() < share else range(len(data))
        at = min(random_.choice(inside), len(data)) if len(inside) else 0
        data = _hit(data, at, random_.choice(KINDS), random_.choice([1, 1, 2, 4, 8, 64, 700]), random_)
    return data


def _hit(data: bytes, at: int, kind: str, size: int, random_: random.Random) -> bytes:
    end = min(at + (1 if kind in ("bit", "byte") else size), len(data))
    before, hit, after = data[:at], data[at:end], data[end:]
    match kind:
        case "bit":
            return before + bytes(byte ^ 1 << random_.randrange(8) for byte in hit) + after
        case "byte" | "random":
            return before + random_.randbytes(len(hit)) + after
        case "zero":
            return before + bytes(len(hit)) + after
        case "ones":
            return before + b"\xff" * len(hit) + after
        case "truncate":
            return before
        case "insert":
            return before + random_.randbytes(size) + hit + after
        case "remove":
            return before + after
    place = random_.randrange(len(data) + 1)
    return before + data[place : place + len(hit)] + after


def bits_flipped(data: bytes, random_: random.Random, inside: list[range]) -> bytes:
    """Return `data` with one to three bits flipped inside the ranges."""
    for _ in range(random_.choice([1, 1, 2, 3])):
        data = _hit(data, random_.choice(random_.choice(inside)), "bit", 1, random_)
    return data


def parts_of(path: Path) -> tuple[list[range], list[range], list[range]]:
    """Return the byte ranges of an HDF5 file: metadata, string heaps, and values of contiguous datasets."""
    data = path.read_bytes()
    with h5py.File(path, "r") as file:
        spans = [(dataset.id.get_offset(), dataset.id.get_storage_size()) for dataset in file.values()]
    values = [range(offset, offset + size) for offset, size in spans if offset is not None]
    starts = [match.start() for match in re.finditer(b"GCOL\x01\0\0\0", data)]
    heaps = [range(start, start + int.from_bytes(data[start + 8 : start + 16], "little")) for start in starts]
    metadata, start = [], 0
    for taken in [*sorted(values + heaps, key=lambda taken: taken.start), range(len(data), len(data))]:
        metadata.append(range(start, taken.start))
        start = taken.stop
    return [found for found in metadata if len(found)], heaps, values
