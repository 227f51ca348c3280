"""Exports as one table: Parquet, .npy, CSV, AnnData, FAISS."""

import json
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np

from seqmill.base.files import whole_or_absent
from seqmill.base.hdf5 import STRINGS, NewFile, RowWriter, new_hdf5
from seqmill.errors import SeqmillError
from seqmill.export.names import IDS, unique_names, whole_export
from seqmill.store.embeddings import EmbeddingsFile, read_blocks, read_ids

TEXT_BUFFER = 1 << 20
FLAT_INNER_PRODUCT = b"IxFI"  # the first bytes of a file of faiss.IndexFlatIP


def write_parquet(embeddings: EmbeddingsFile, output: Path, records: Path | None = None) -> None:
    """Write columns `id`, `length` (int32) and `embedding` (a list of fixed size, float32), a row group per block.

    The schema's metadata holds the attributes of the embeddings file as JSON, under `seqmill`.
    """
    import pyarrow
    import pyarrow.parquet

    width = embeddings.array.shape[1]
    schema = pyarrow.schema(
        {"id": pyarrow.string(), "length": pyarrow.int32(), "embedding": pyarrow.list_(pyarrow.float32(), width)},
        metadata={"seqmill": json.dumps(embeddings.attrs, ensure_ascii=False)},
    )
    # Dictionaries save nothing: ids and numbers hardly repeat.
    with (
        whole_export(output) as temporary,
        pyarrow.parquet.ParquetWriter(temporary, schema, use_dictionary=False) as writer,
    ):
        for block in read_blocks(embeddings):
            flat = pyarrow.array(block.vectors.astype(np.float32, copy=False).reshape(-1))
            columns = [block.ids, block.lengths, pyarrow.FixedSizeListArray.from_arrays(flat, width)]
            writer.write_table(pyarrow.table(columns, schema), row_group_size=len(block.ids))


def write_text(embeddings: EmbeddingsFile, output: Path, records: Path | None = None, *, separator: str) -> None:
    """Write a line per record, after a header: `id`, `length`, and the numbers `d0`, `d1` ..., as text in UTF-8.

    Ids with a quote or the separator are quoted as in RFC 4180. Nine digits restore every float32, also for readers
    that parse float64, or not quite exactly.
    """
    width = embeddings.array.shape[1]
    form = separator.join(["%s", "%d", *["%.9g"] * width]) + "\n"
    special = re.compile(f'["{separator}]')
    with whole_export(output) as temporary, temporary.open("wb", buffering=TEXT_BUFFER) as file:
        file.write((separator.join(["id", "length", *(f"d{number}" for number in range(width))]) + "\n").encode())
        for block in read_blocks(embeddings):
            for id_, length, vector in zip(block.ids, block.lengths.tolist(), block.vectors, strict=True):
                quoted = '"' + id_.replace('"', '""') + '"' if special.search(id_) else id_
                file.write((form % (quoted, length, *vector.tolist())).encode())


def write_npy(embeddings: EmbeddingsFile, output: Path, records: Path | None = None) -> None:
    """Write an array (records, hidden_dim) that `numpy.load(mmap_mode="r")` can map, and the ids next to it."""
    array = embeddings.array
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    with _with_ids(embeddings, output) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in read_blocks(embeddings):
            file.write(block.vectors)


def write_faiss(embeddings: EmbeddingsFile, output: Path, records: Path | None = None) -> None:
    """Write a faiss.IndexFlatIP of the vectors divided by their norms (scores are cosines), and the ids next to it.

    FAISS itself would hold all vectors in memory to write them. The file of a flat index is that of an empty one with
    two numbers filled in, followed by the vectors (faiss/impl/index_write.cpp).
    """
    import faiss

    rows, width = embeddings.array.shape
    empty = faiss.serialize_index(faiss.IndexFlatIP(width)).tobytes()
    # Magic, dimension (int32), rows (int64) ... number of values (int64), values (float32).
    if empty[:16] != FLAT_INNER_PRODUCT + struct.pack("<iq", width, 0) or empty[-8:] != bytes(8):
        raise SeqmillError(f"faiss {faiss.__version__} writes flat indexes in a new layout; install an older version")
    with _with_ids(embeddings, output) as file:
        file.write(empty[:8] + struct.pack("<q", rows) + empty[16:-8] + struct.pack("<q", rows * width))
        for block in read_blocks(embeddings):
            exact = block.vectors.astype(np.float64)
            norms = np.sqrt(np.square(exact).sum(axis=1, keepdims=True))
            file.write((exact / np.where(norms == 0, 1, norms)).astype(np.float32))  # zero stays zero


def write_h5ad(embeddings: EmbeddingsFile, output: Path, records: Path | None = None) -> None:
    """Write an AnnData file: `X`, `obs` (unique names; `id`, `length`), `uns` (the attributes of the embeddings file).

    It follows AnnData's file specification (docs/fileformat-prose.md there, encoding versions of 0.8 and later),
    because AnnData itself would hold all ids and all vectors in memory.
    """
    rows, width = embeddings.array.shape
    with whole_export(output) as temporary:
        with new_hdf5(temporary) as file:
            _encode(file, "anndata", "0.1.0")
            obs = _new_frame(file, "obs", ["id", "length"])
            _encode(obs.create_dataset("length", data=embeddings.lengths), "array")
            ids = partial(read_ids, embeddings)
            for name, texts in (("id", ids()), ("_index", unique_names(ids))):
                file.write_strings(f"obs/{name}", np.arange(rows), partial(_following, texts))
                _encode(obs[name], "string-array")
            var = _new_frame(file, "var", [])
            _encode(var.create_dataset("_index", data=[str(n) for n in range(width)], dtype=STRINGS), "string-array")
            for name in ("uns", "layers", "obsm", "obsp", "varm", "varp"):
                _encode(file.create_group(name), "dict", "0.1.0")
            for name, value in embeddings.attrs.items():
                kind = "string" if isinstance(value, str) else "numeric-scalar"
                _encode(file["uns"].create_dataset(name, data=value), kind)
            file.reserve("X", (rows, width), embeddings.array.dtype)
            _encode(file["X"], "array")
        with RowWriter(temporary, "X") as writer:
            for block in read_blocks(embeddings):
                writer.append(block.vectors)


def _following(texts: Iterator[str], rows: np.ndarray) -> list[str]:
    return [*islice(texts, len(rows))]


@contextmanager
def _with_ids(embeddings: EmbeddingsFile, output: Path) -> Iterator[BinaryIO]:
    """Write the ids, one per line, next to the output; yield the output, open for writing."""
    ids = output.with_name(output.name + IDS)
    with whole_or_absent(ids) as new_ids:
        with new_ids.open("w", encoding="utf-8", newline="") as text:
            text.writelines(f"{id_}\n" for id_ in read_ids(embeddings))
        with whole_export(output, ids) as temporary, temporary.open("wb") as file:
            yield file


def _new_frame(file: NewFile, name: str, columns: list[str]) -> h5py.Group:
    group = file.create_group(name)
    _encode(group, "dataframe")
    group.attrs["_index"] = "_index"
    group.attrs.create("column-order", columns, (len(columns),), STRINGS)
    return group


def _encode(element: h5py.Group | h5py.Dataset, kind: str, version: str = "0.2.0") -> None:
    element.attrs["encoding-type"] = kind
    element.attrs["encoding-version"] = version
