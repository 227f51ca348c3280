"""Exports that are one table: Parquet, .npy, AnnData, FAISS."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import h5py
import numpy as np

from seqmill.base.files import whole_or_absent
from seqmill.base.hdf5 import STRINGS, NewFile, RowWriter, new_hdf5, reserve_dataset
from seqmill.errors import SeqmillError
from seqmill.export.formats import IDS
from seqmill.export.names import UniqueNames
from seqmill.export.output_files import whole_export
from seqmill.store.embeddings import ID_BLOCK, Embeddings, read_blocks, read_ids

FLAT_INNER_PRODUCT = b"IxFI"  # what a file of faiss.IndexFlatIP begins with


def write_parquet(embeddings: Embeddings, output: Path, records: Path | None = None) -> None:
    """Write columns `id`, `length` (int32) and `embedding` (a list of fixed size, float32), a row group a block.

    The file's attributes stand as JSON in the schema's metadata, under `seqmill`.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing("parquet", "pyarrow") from None
    width = embeddings.array.shape[1]
    schema = pyarrow.schema(
        {"id": pyarrow.string(), "length": pyarrow.int32(), "embedding": pyarrow.list_(pyarrow.float32(), width)},
        metadata={"seqmill": json.dumps(embeddings.attrs, ensure_ascii=False)},
    )
    # Dictionaries would not pay: hardly an id or a number is repeated.
    with (
        whole_export(output) as temporary,
        pyarrow.parquet.ParquetWriter(temporary, schema, use_dictionary=False) as writer,
    ):
        for block in read_blocks(embeddings):
            flat = pyarrow.array(block.vectors.astype(np.float32, copy=False).reshape(-1))
            columns = [block.ids, block.lengths, pyarrow.FixedSizeListArray.from_arrays(flat, width)]
            writer.write_table(pyarrow.table(columns, schema), row_group_size=len(block.ids))


def write_npy(embeddings: Embeddings, output: Path, records: Path | None = None) -> None:
    """Write an array (records, hidden_dim) that `numpy.load(mmap_mode="r")` maps, and its ids beside it."""
    array = embeddings.array
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    with _ids_beside(embeddings, output) as ids, whole_export(output, ids) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in read_blocks(embeddings):
            file.write(block.vectors)


def write_faiss(embeddings: Embeddings, output: Path, records: Path | None = None) -> None:
    """Write a faiss.IndexFlatIP over the vectors divided by their norms, so that its scores are cosines; ids beside it.

    FAISS itself would hold all vectors in memory to write them. Its file of a flat index is that of an empty one with
    two numbers filled in, and the vectors (faiss/impl/index_write.cpp).
    """
    try:
        import faiss
    except ImportError:
        raise missing("faiss", "faiss-cpu") from None
    rows, width = embeddings.array.shape
    empty = faiss.serialize_index(faiss.IndexFlatIP(width)).tobytes()
    # Magic, dimension (int32), rows (int64) ... number of values (int64), values (float32).
    if empty[:16] != FLAT_INNER_PRODUCT + struct.pack("<iq", width, 0) or empty[-8:] != bytes(8):
        raise SeqmillError(f"faiss {faiss.__version__} writes flat indexes in a way that seqmill does not know yet")
    with _ids_beside(embeddings, output) as ids, whole_export(output, ids) as temporary, temporary.open("wb") as file:
        file.write(empty[:8] + struct.pack("<q", rows) + empty[16:-8] + struct.pack("<q", rows * width))
        for block in read_blocks(embeddings):
            file.write(normalized(block.vectors))


def write_h5ad(embeddings: Embeddings, output: Path, records: Path | None = None) -> None:
    """Write an AnnData file: `X`, `obs` (unique names; `id`, `length`), `uns` (the file's attributes).

    It follows AnnData's specification of its files (docs/fileformat-prose.md there, encoding versions of 0.8 and
    later), because AnnData itself would hold all ids, and its writing of `X` all vectors, in memory.
    """
    rows, width = embeddings.array.shape
    with whole_export(output) as temporary:
        with new_hdf5(temporary) as file:
            _encode(file, "anndata", "0.1.0")
            _write_obs(file, embeddings)
            var = file.create_group("var")
            _encode_frame(var, [])
            _encode(var.create_dataset("_index", data=[str(n) for n in range(width)], dtype=STRINGS), "string-array")
            uns = file.create_group("uns")
            _encode(uns, "dict", "0.1.0")
            for name, value in embeddings.attrs.items():
                kind = "string" if isinstance(value, str) else "numeric-scalar"
                _encode(uns.create_dataset(name, data=value), kind)
            for name in ("layers", "obsm", "obsp", "varm", "varp"):
                _encode(file.create_group(name), "dict", "0.1.0")
            reserve_dataset(file, "X", (rows, width), embeddings.array.dtype)
            _encode(file["X"], "array")
        with RowWriter(temporary, "X") as writer:
            for block in read_blocks(embeddings):
                writer.append(block.vectors)


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Return vectors (n, hidden_dim) divided by their norms in float64, as float32; a zero vector stays zero."""
    exact = vectors.astype(np.float64)
    norms = np.sqrt(np.square(exact).sum(axis=1, keepdims=True))
    return (exact / np.where(norms == 0, 1, norms)).astype(np.float32)


def missing(format_name: str, package: str) -> SeqmillError:
    """Return the error that a package is not installed that a format needs."""
    return SeqmillError(f"the format {format_name} needs {package}: pip install 'seqmill[export]' (or {package})")


@contextmanager
def _ids_beside(embeddings: Embeddings, output: Path) -> Iterator[Path]:
    """Write the ids, one a line; yield where they will be when the block has succeeded."""
    ids = output.with_name(output.name + IDS)
    with whole_or_absent(ids) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.writelines(f"{id_}\n" for id_ in read_ids(embeddings))
        yield ids


def _write_obs(file: NewFile, embeddings: Embeddings) -> None:
    obs = file.create_group("obs")
    _encode_frame(obs, ["id", "length"])
    _encode(obs.create_dataset("length", data=embeddings.lengths), "array")
    names, ids = (obs.create_dataset(name, (len(embeddings),), STRINGS) for name in ("_index", "id"))
    _encode(names, "string-array")
    _encode(ids, "string-array")
    unique, every = UniqueNames(read_ids(embeddings)), read_ids(embeddings)
    for start in range(0, len(embeddings), ID_BLOCK):
        block = list(islice(every, ID_BLOCK))
        ids[start : start + len(block)] = block
        names[start : start + len(block)] = [unique.next(id_) for id_ in block]
        file.check()


def _encode_frame(group: h5py.Group, columns: list[str]) -> None:
    _encode(group, "dataframe")
    group.attrs["_index"] = "_index"
    group.attrs.create("column-order", columns, (len(columns),), STRINGS)


def _encode(element: h5py.Group | h5py.Dataset, kind: str, version: str = "0.2.0") -> None:
    element.attrs["encoding-type"] = kind
    element.attrs["encoding-version"] = version
