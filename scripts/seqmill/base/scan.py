"""A file read once, for its digest and for numbers in it that are not finite."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import numpy as np

from seqmill.base.files import name_errors

# Large, as each block waits for the interpreter's lock a few times; small beside the memory of a machine.
BLOCK_BYTES = 8 << 20


def sha256_and_finite(path: Path, arrays: list[np.ndarray]) -> tuple[str, list[int | None]]:
    """Return the hexadecimal SHA-256 of a file's bytes, and where numbers in it are not finite.

    Args:
        path: the file.
        arrays: floating-point numbers, memory maps of parts of the file; those without a number need not be.

    Returns:
        the digest; of each array the place of its first number that is not finite, counted through all its
        dimensions, or None.
    """
    digest = hashlib.sha256()
    places: list[int | None] = [None] * len(arrays)
    maps = [(values.offset, number, values) for number, values in enumerate(arrays) if isinstance(values, np.memmap)]
    with name_errors(path), path.open("rb", buffering=0) as file:
        # Not by the memory maps: their numbers need not be aligned, and a page fault every 64 KB is dearer.
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


def _blocks(file: FileIO, num_bytes: int) -> Iterator[np.ndarray]:
    """Yield the next bytes of a file (uint8), each block in the place of the one before; fewer if the file ends."""
    buffer = np.empty(min(num_bytes, BLOCK_BYTES), np.uint8)
    while num_bytes > 0:
        block = buffer[:num_bytes]
        filled = 0
        while filled < len(block) and (count := file.readinto(memoryview(block)[filled:])):
            filled += count
        if filled == 0:
            return
        yield block[:filled]
        num_bytes -= filled
