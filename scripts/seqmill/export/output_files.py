"""Exports whole or absent, under the names that an error should tell, and the room that they need."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seqmill.base.files import fsync, require_space, whole_or_absent
from seqmill.errors import SeqmillError
from seqmill.store.embeddings import Embeddings

DISK_BLOCK = 4096  # bytes; what a file takes is a multiple of it on most file systems
# Bytes a record besides the vector, with ids of 20 characters or so: in text; in an HDF5 string twice, with what
# points to it; of an HDF5 dataset with its attribute; of a .pt file.
ID_BYTES, OBS_BYTES, DATASET_BYTES, PT_BYTES = 32, 128, 400, 1800


@contextmanager
def whole_export(output: Path, beside: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path, renamed to `output` if the block succeeds, whose errors name `output`.

    The old `beside`, which names the rows of the old `output`, goes first: whatever happens in between, the ids of
    one export never lie beside the vectors of another. Its successor is to get its name last.
    """
    with whole_or_absent(output) as temporary:
        yield temporary
        if beside:
            beside.unlink(missing_ok=True)
            fsync(beside.parent)


def require_room(folder: Path, embeddings: Embeddings, format_name: str) -> None:
    """Raise a SeqmillError if the disk of `folder` has too little room, or too few files left, for an export."""
    what = f"{len(embeddings)} embeddings as {format_name}"
    require_space(folder, bytes_needed(embeddings, format_name), what)
    disk = os.statvfs(folder)
    # Some file systems, such as Btrfs, do not count files: f_files is 0.
    if format_name == "pt" and disk.f_files and disk.f_favail < len(embeddings) + 2:
        raise SeqmillError(
            f"{folder}: {what} are as many files, of which the disk takes {disk.f_favail:,} more; "
            "take another disk, or the format h5, which is one file"
        )


def bytes_needed(embeddings: Embeddings, format_name: str) -> int:
    """Return about how many bytes an export takes on disk; parquet, faiss and pt are float32 whatever the file is."""
    rows, width = embeddings.array.shape
    as_stored, as_float32 = embeddings.array.nbytes, 4 * rows * width
    if format_name == "pt":
        files = rows * -(-(PT_BYTES + 4 * width) // DISK_BLOCK) * DISK_BLOCK
        if embeddings.has_residues:
            to_float32 = 2 if embeddings.attrs["per_residue"] == "float16" else 1
            files += to_float32 * embeddings.residue_bytes + rows * DISK_BLOCK // 2  # half of the last block is empty
        return files + rows * 2 * ID_BYTES
    return {
        "parquet": as_float32 + rows * ID_BYTES,
        "npy": as_stored + rows * ID_BYTES,
        "h5ad": as_stored + rows * OBS_BYTES,
        "h5": as_stored + rows * DATASET_BYTES,
        "h5_residues": embeddings.residue_bytes + rows * DATASET_BYTES,
        "faiss": as_float32 + rows * ID_BYTES,
    }[format_name]
