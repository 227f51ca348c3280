"""Digests of parts of files; reading a file once gives its digest and its first non-finite number."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from seqmill.base.digests import READ_BYTES, sha256_and_finite, sha256_but_for

NUM_ROWS, WIDTH = 3 * READ_BYTES // 40 + 7, 10  # more than three blocks of float32, which split rows


def write_file(path: Path, before: int, values: np.ndarray, between: int, halves: np.ndarray, after: int) -> None:
    """Write numbers of two dtypes, surrounded by bytes that look like NaN."""
    path.write_bytes(
        b"\xff" * before + values.tobytes() + b"\xff" * between + halves.tobytes() + b"\xff" * after,
    )


def scanned(path: Path, before: int, values: np.ndarray, between: int, halves: np.ndarray) -> list[int | None]:
    second = before + values.nbytes + between
    maps = [
        np.memmap(path, np.float32, "r", before, values.shape),
        np.memmap(path, np.float16, "r", second, halves.shape),
    ]
    digest, places = sha256_and_finite(path, maps)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    # The order of the arrays does not matter.
    assert sha256_and_finite(path, maps[::-1]) == (digest, places[::-1])
    return places


@pytest.mark.parametrize("before", [0, 3, 4096, READ_BYTES + 1])
def test_numbers_anywhere_in_the_file(before: int, tmp_path: Path):
    generator = np.random.default_rng(before)
    values = generator.normal(size=(NUM_ROWS, WIDTH)).astype(np.float32)
    halves = generator.normal(size=(1000, 3)).astype(np.float16)
    path = tmp_path / "file"
    for place, wrong in ((None, 0.0), (0, np.nan), (values.size // 2, np.inf), (values.size - 1, -np.inf)):
        changed = values.copy()
        if place is not None:
            changed.reshape(-1)[place:] = wrong
        write_file(path, before, changed, 5, halves, 11)
        assert scanned(path, before, changed, 5, halves) == [place, None]
    halves[7, 1] = np.inf
    write_file(path, before, values, 0, halves, 0)
    assert scanned(path, before, values, 0, halves) == [None, 22]


@pytest.mark.parametrize("size", [0, 1, READ_BYTES - 1, READ_BYTES, READ_BYTES + 1])
def test_a_file_without_numbers(size: int, tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"\xff" * size)
    digest = hashlib.sha256(b"\xff" * size).hexdigest()
    assert sha256_and_finite(path, []) == (digest, [])
    assert sha256_and_finite(path, [np.empty((0, 3), np.float32)]) == (digest, [None])


@pytest.mark.parametrize(("offset", "size", "rest"), [(0, 2, b"cdef"), (2, 3, b"abf"), (6, 0, b"abcdef")])
def test_sha256_but_for_a_part(offset: int, size: int, rest: bytes, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"abcdef")
    assert sha256_but_for(tmp_path / "file", offset, size) == hashlib.sha256(rest).hexdigest()


def test_sha256_but_for_a_part_of_a_truncated_file_ends(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"abcdef")
    assert sha256_but_for(tmp_path / "file", 4, 10) == hashlib.sha256(b"abcd").hexdigest()
    assert sha256_but_for(tmp_path / "file", 10, 5) == hashlib.sha256(b"abcdef").hexdigest()
