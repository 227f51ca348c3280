"""Digests of parts of files, and a search for numbers that are not finite in the same pass."""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from seqmill.base.files import name_errors

# Large, because each block waits for the interpreter's lock a few times; small compared with a machine's memory.
READ_BYTES = 8 << 20


def sha256_but_for(path: Path, offset: int, size: int) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes except `size` bytes from `offset` on."""
    digest = hashlib.sha256()
    with name_errors(path), path.open("rb", buffering=0) as file:
        for start, end in ((0, offset), (offset + size, path.stat().st_size)):
            file.seek(start)
            for block in _blocks(file, end - start):
                digest.update(block)
    return digest.hexdigest()


def sha256_and_finite(path: Path, arrays: list[np.ndarray]) -> tuple[str, list[int | None]]:
    """Read a file once; return its hexadecimal SHA-256, and the flat index of each array's first non-finite number.

    `arrays` are floating-point memory maps of parts of the file; empty arrays need not be memory maps.
    """
    digest = hashlib.sha256()
    places: list[int | None] = [None] * len(arrays)
    maps = [(values.offset, number, values) for number, values in enumerate(arrays) if isinstance(values, np.memmap)]
    with name_errors(path), path.open("rb", buffering=0) as file:
        # Reading is faster than using the memory maps: their numbers may be unaligned, and page faults cost more.
        for offset, number, values in sorted(maps, key=lambda found: found[0]):
            for block in _blocks(file, offset - file.tell()):
                digest.update(block)
            seen = 0
            for block in _blocks(file, values.nbytes):
                digest.update(block)
                finite = np.isfinite(block.view(values.dtype))
                if places[number] is None and not finite.all():
                    places[number] = seen + int(np.flatnonzero(~finite)[0])
                seen += len(finite)
        for block in _blocks(file, path.stat().st_size - file.tell()):
            digest.update(block)
    return digest.hexdigest(), places


def _blocks(file: io.FileIO, num_bytes: int) -> Iterator[np.ndarray]:
    """Yield the next bytes of a file (uint8) in blocks that overwrite each other; fewer bytes if the file ends."""
    buffer = np.empty(min(max(num_bytes, 0), READ_BYTES), np.uint8)
    while num_bytes > 0:
        block = buffer[:num_bytes]
        filled = 0
        while filled < len(block) and (count := file.readinto(memoryview(block)[filled:])):
            filled += count
        if filled == 0:
            return
        yield block[:filled]
        num_bytes -= filled
