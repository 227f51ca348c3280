"""A file read once, for its digest and for numbers in it that are not finite."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

# Large, as each block waits for the interpreter's lock a few times; small beside the memory of a machine.
BLOCK_BYTES = 8 << 20


def sha256_and_finite(path: Path, values: np.ndarray) -> tuple[str, int | None]:
    """Return the hexadecimal SHA-256 of a file's bytes, and the first of some numbers in it that is not finite.

    Args:
        path: the file.
        values: floating-point numbers, a memory map of a part of the file; may be empty.

    Returns:
        the digest; the place of the number in `values`, counted through all dimensions, or None.
    """
    digest = hashlib.sha256()
    place = None
    offset = values.offset if isinstance(values, np.memmap) else 0
    with path.open("rb", buffering=0) as file:
        for block in _blocks(file, offset):
            digest.update(block)
        seen = 0
        # Not by the memory map: its numbers need not be aligned, and reading is cheaper than a page fault every 64 KB.
        for block in _blocks(file, values.nbytes):
            digest.update(block)
            numbers = block.view(values.dtype)
            if place is None and not np.isfinite(numbers).all():
                place = seen + int(np.flatnonzero(~np.isfinite(numbers))[0])
            seen += len(numbers)
        for block in _blocks(file, path.stat().st_size - offset - values.nbytes):
            digest.update(block)
    return digest.hexdigest(), place


def _blocks(file: BinaryIO, num_bytes: int) -> Iterator[np.ndarray]:
    """Yield the next bytes of a file (uint8), each block in the place of the one before; fewer if the file ends."""
    buffer = np.empty(min(num_bytes, BLOCK_BYTES), np.uint8)
    while num_bytes > 0:
        block = buffer[:num_bytes]
        filled = 0
        while filled < len(block) and (count := file.readinto(memoryview(block)[filled:])):  # type: ignore[attr-defined]
            filled += count
        if filled == 0:
            return
        yield block[:filled]
        num_bytes -= filled
