"""The thread that writes the outputs writes every value or raises one error."""

import errno
import hashlib
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest

from seqmill.base.hdf5 import KEEP_BYTES, SEND_BYTES, new_hdf5
from seqmill.errors import SeqmillError
from seqmill.merge.vectors import write_outputs

WIDTH = 256


def reserved(path: Path, names: list[str], num_rows: int, dtype: str = "float32") -> Path:
    with new_hdf5(path) as file:
        for name in names:
            file.reserve(name, (num_rows, WIDTH), dtype)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_each_output_has_its_columns_and_its_digest(dtype: str, tmp_path: Path):
    values = np.random.default_rng(1).normal(size=(1001, 3 * WIDTH)).astype(np.float32)
    names = ["embeddings", "second", "third"]
    path = reserved(tmp_path / "some.h5", names, len(values), dtype)
    blocks = (values[start : start + 100].copy() for start in range(0, len(values), 100))
    digests = write_outputs(path, names, dtype, blocks, str)
    with h5py.File(path) as file:
        for name, expected in zip(names, np.split(values.astype(dtype), 3, axis=1), strict=True):
            np.testing.assert_array_equal(file[name][:], expected)
            assert digests[name] == hashlib.sha256(expected.tobytes()).hexdigest()


def test_data_dropped_from_the_page_cache_is_in_the_file(tmp_path: Path):
    """Write so much that the first bytes are dropped from memory while the last are written."""
    rows = (KEEP_BYTES + 3 * SEND_BYTES) // (4 * WIDTH) + 1
    path = reserved(tmp_path / "some.h5", ["embeddings"], rows)
    digest = hashlib.sha256()

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, rows, 8192):
            block = np.arange(start, min(start + 8192, rows), dtype=np.float32)[:, None] + np.zeros(WIDTH, np.float32)
            digest.update(block)
            yield block

    digests = write_outputs(path, ["embeddings"], "float32", blocks(), str)
    assert digests == {"embeddings": digest.hexdigest()}
    with h5py.File(path) as file:
        column = file["embeddings"][:, WIDTH - 1]
    np.testing.assert_array_equal(column, np.arange(rows, dtype=np.float32))


def test_a_value_beyond_float16_is_named(tmp_path: Path):
    path = reserved(tmp_path / "some.h5", ["a", "b"], 5, "float16")
    blocks = np.zeros((5, 2 * WIDTH), np.float32)
    blocks[4, -1] = 70000
    with pytest.raises(SeqmillError, match=r"^record 4: a value of b is beyond float16"):
        write_outputs(path, ["a", "b"], "float16", [blocks[:3], blocks[3:]], "record {}".format)


@contextmanager
def no_room_beyond(num_bytes: int) -> Iterator[None]:
    """Make this process's writes beyond `num_bytes` of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:  # before the test's result is printed, perhaps to a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_write_that_fails_in_the_thread_is_raised(blocks: int, tmp_path: Path):
    """At the next block, or at the end after the last."""
    path = reserved(tmp_path / "some.h5", ["embeddings"], 3)
    with h5py.File(path) as file:
        offset = file["embeddings"].id.get_offset()

    def fill_the_disk() -> Iterator[np.ndarray]:
        """Fill the disk from the first block to the test's end, after the space of all rows was reserved."""
        full.enter_context(no_room_beyond(offset))
        for _ in range(blocks):
            yield np.zeros((3 // blocks, WIDTH), np.float32)

    with ExitStack() as full, pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        write_outputs(path, ["embeddings"], "float32", fill_the_disk(), str)
