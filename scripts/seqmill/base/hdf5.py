"""HDF5: errors that name the file, writing that survives full disks and signals, datasets as memory maps."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from seqmill.base.digests import sha256_but_for
from seqmill.base.files import name_errors, refuse_special
from seqmill.base.signals import held_back_signals
from seqmill.errors import SeqmillError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STRINGS = h5py.string_dtype("utf-8")
STRING_BLOCK = 65536
SEND_BYTES = 32 << 20
KEEP_BYTES = 64 << 20  # recent pages, which the disk may still be writing
# HDF5 1.10 (2016) and later put checksums on metadata. Without them a flipped bit may hang or crash the library, or
# silently change a number.
FORMAT = ("v110", "v110")
# HDF5's own locks fail on file systems without locks (its "best effort" forgives only ENOSYS). They are not needed:
# files get their names when they are whole, and shards have our locks. HDF5_USE_FILE_LOCKING overrides this.
LOCKING = False
# The exceptions that h5py raises for damaged files, such as lost names and impossible sizes and types.
DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, OverflowError, MemoryError)
SHOWN_ERROR = 300  # characters


@contextmanager
def open_hdf5(path: Path, what: str) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading; `what` is its kind for messages ("index", "shard", ...).

    Raise a SeqmillError if it is absent, not HDF5, truncated or damaged, also if that shows only inside the block.
    """
    if path.is_dir():
        raise SeqmillError(f"{path}: is a folder; name the {what} in it")
    refuse_special(path)
    if not path.is_file():
        raise SeqmillError(f"{path}: no such {what}")
    try:
        with h5py.File(path, "r", locking=LOCKING) as file:
            yield file
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:SHOWN_ERROR]
        raise SeqmillError(f"{path}: not a readable HDF5 {what}, or truncated or damaged: {reason}") from error


@contextmanager
def new_hdf5(path: Path) -> Iterator["NewFile"]:
    """Create an HDF5 file for writing; a failed write (full disk) is raised when the block ends.

    Signal handlers also run only then, because HDF5 does not survive an exception inside a write. Blocks that write for
    long call `NewFile.check` in between.
    """
    with name_errors(path), ExitStack() as held, _PatientFile(path) as raw:
        held.enter_context(held_back_signals())
        try:
            with NewFile(raw, held) as file:
                yield file
        finally:
            if raw.error is not None:
                raise OSError(raw.error.errno, raw.error.strerror, str(path)) from raw.error


class RowWriter:
    """Writes the rows of a reserved dataset in order, bypassing HDF5, so that a failing write raises at once.

    Disk space for all rows is allocated first, so that a full disk shows before the work. Rows are flushed to the disk
    as they come, so that little is left to wait for at the end. `forget` drops written rows from the page cache, to
    leave it to files that are still to be read. macOS can do neither: a full disk shows at the write that fails.
    """

    def __init__(self, path: Path, name: str, forget: bool = False) -> None:
        with name_errors(path), path.open("rb") as raw, h5py.File(raw, "r") as file:  # Python raises errors at close
            dataset = file[name]
            self._shape, self._dtype = dataset.shape, dataset.dtype
            self._offset = dataset.id.get_offset() or 0
        self._written = self._sent = 0
        self._forget = forget
        self._path = path
        self._file = path.open("r+b", buffering=0)
        size = self._shape[0] * self._shape[1] * self._dtype.itemsize
        if size:
            with name_errors(path):
                _allocate(self._file.fileno(), self._offset, size)
        self._file.seek(self._offset)

    def append(self, rows: np.ndarray) -> None:
        """Write the next rows, (n, columns), in the dataset's dtype."""
        assert rows.dtype == self._dtype
        assert rows.shape[1:] == self._shape[1:]
        rest = memoryview(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
        with name_errors(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]
        self._written += len(rows)
        self._send(self._file.tell() - self._offset)

    def _send(self, written: int) -> None:
        """Start flushing written rows to the disk, without waiting."""
        if written - self._sent < SEND_BYTES:
            return
        # This advice drops the pages that are on the disk, and starts writing the others.
        first = max(self._sent - KEEP_BYTES, 0) if self._forget else self._sent
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), self._offset + first, written - first, os.POSIX_FADV_DONTNEED)
        self._sent = written

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with name_errors(self._path):
            self._file.close()
        if kind is None:
            assert self._written == self._shape[0], f"{self._path}: {self._written} of {self._shape[0]} rows written"


def _allocate(descriptor: int, offset: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, offset, size)


class NewFile(h5py.File):  # type: ignore[misc]  # h5py has no types
    """An HDF5 file open for writing (`new_hdf5`)."""

    def __init__(self, raw: "_PatientFile", held: ExitStack) -> None:
        super().__init__(raw, "w", libver=FORMAT)
        self._raw, self._held = raw, held

    def check(self) -> None:
        """Raise the error of a failed write, or run the handlers of signals that arrived since the last call."""
        if self._raw.error is not None:
            raise self._raw.error
        try:
            self._held.close()
        finally:  # the file still has to be closed
            self._held.enter_context(held_back_signals())

    def write_strings(
        self, name: str, rows: np.ndarray, texts_of: Callable[[np.ndarray], list[str] | list[bytes]]
    ) -> None:
        """Write a dataset of strings in blocks of bounded size.

        `texts_of(rows)` returns the strings as str, or as UTF-8, which is faster.
        """
        strings = self.create_dataset(name, (len(rows),), STRINGS)
        for start in range(0, len(rows), STRING_BLOCK):
            block = rows[start : start + STRING_BLOCK]
            texts = np.empty(len(block), object)  # without it NumPy first pads the texts to equal length
            texts[:] = texts_of(block)
            strings[start : start + len(block)] = texts
            self.check()

    def reserve(self, name: str, shape: tuple[int, int], dtype: str | type | np.dtype) -> None:
        """Create a contiguous dataset whose values a `RowWriter` writes after the file is closed."""
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.CONTIGUOUS)
        plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        plist.set_obj_track_times(False)  # equal content gives equal files
        space, type_ = h5py.h5s.create_simple(shape), h5py.h5t.py_create(np.dtype(dtype))
        h5py.h5d.create(self.id, name.encode(), type_, space, plist)


class _PatientFile(io.FileIO):
    """A file that keeps its first write error instead of raising it.

    After a failed write HDF5 can't close the file, and the interpreter crashes at exit.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), "w+")  # str, because errors show the name as given
        self.error: OSError | None = None

    def write(self, data: "ReadableBuffer", /) -> int:
        rest = whole = memoryview(data)
        while len(rest) and self.error is None:
            try:
                rest = rest[super().write(rest) :]
            except OSError as error:
                self.error = error
        return len(whole)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return self.tell() if size is None else size


def map_dataset(path: Path, dataset: h5py.Dataset) -> np.ndarray:
    """Return a read-only memory map of a contiguous dataset (an empty array if it has no elements)."""
    offset = dataset.id.get_offset()
    if dataset.size == 0:
        return np.empty(dataset.shape, dataset.dtype)
    if offset is None:
        raise SeqmillError(f"{path}: dataset {dataset.name} is not contiguous; was the file rewritten by another tool?")
    with name_errors(path):
        return np.memmap(path, dataset.dtype, mode="r", offset=offset, shape=dataset.shape)


def sha256_around(path: Path, name: str) -> dict[str, int | str]:
    """Digest a file except the values of one contiguous dataset, for a check without HDF5.

    A flipped bit among variable-length strings can make HDF5 2.0 read forever.

    Returns:
        data_offset, data_bytes: the position of the dataset's values in the file.
        rest_sha256: hexadecimal SHA-256 of all other bytes.
    """
    with name_errors(path), path.open("rb") as raw, h5py.File(raw, "r") as file:
        dataset = file[name]
        offset, size = dataset.id.get_offset() or 0, dataset.nbytes
    return {"data_offset": offset, "data_bytes": size, "rest_sha256": sha256_but_for(path, offset, size)}


def write_attributes(file: h5py.File, attributes: dict[str, Any]) -> None:
    """Write attributes with text of fixed length, which HDF5 keeps in the metadata, under checksums.

    h5py writes str as text of variable length, in a heap without checksums: there a flipped bit can silently change it
    or make HDF5 2.0 read forever. `read_attributes` decodes the bytes that h5py returns.
    """
    for name, value in attributes.items():
        if isinstance(value, str):
            data = value.encode()
            file.attrs.create(name, data, dtype=h5py.string_dtype("utf-8", max(len(data), 1)))
        else:
            file.attrs[name] = value


def read_attributes(file: h5py.File) -> dict[str, Any]:
    """Return a file's attributes as plain Python values."""
    return {key: _plain(value) for key, value in file.attrs.items()}


def _plain(value: Any) -> Any:  # noqa: ANN401
    value = value.item() if isinstance(value, np.generic) else value
    return value.decode() if isinstance(value, bytes) else value
