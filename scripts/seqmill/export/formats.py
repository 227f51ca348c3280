"""The formats of exports. A new one needs a function that writes it, a row in FORMATS and its name in the schema.

The command line and the workflow import this module, so torch, pandas, pyarrow and FAISS are imported in functions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from seqmill.export.entries import write_h5, write_pt
from seqmill.export.names import IDS, NAMES
from seqmill.export.tables import write_faiss, write_h5ad, write_npy, write_parquet, write_text
from seqmill.store.embeddings import EmbeddingsFile

DISK_BLOCK = 4096  # bytes; most file systems round the size of a file up to a multiple of it
NAME_ROW_BYTES = 64  # in names.tsv
TEXT_VALUE_BYTES = 14  # -0.0123456789 and a comma


@dataclass(frozen=True)
class Format:
    """How a format is written, and about how much room it takes."""

    write: Callable[[EmbeddingsFile, Path, Path | None], None]  # file, output, records.tsv.gz (only `pt` reads it)
    record_bytes: int  # on disk besides the vector, with ids of about 20 characters
    beside: str = ""  # the suffix of the file of ids or names next to the output
    value_bytes: int = 0  # of a number; 0: as in the embeddings file
    per_residue: bool = False
    is_folder: bool = False  # with a file per record

    def bytes_needed(self, embeddings: EmbeddingsFile) -> int:
        rows, width = embeddings.array.shape
        if self.per_residue:
            return embeddings.residue_bytes + rows * self.record_bytes
        size = self.record_bytes + width * (self.value_bytes or embeddings.array.itemsize)
        if not self.is_folder:
            return rows * size
        num_bytes = rows * (-(-size // DISK_BLOCK) * DISK_BLOCK + NAME_ROW_BYTES)
        if embeddings.has_residues:  # in float32; on average half of the last block is empty
            to_float32 = 2 if embeddings.attrs["per_residue"] == "float16" else 1
            num_bytes += to_float32 * embeddings.residue_bytes + rows * DISK_BLOCK // 2
        return num_bytes


FORMATS = {
    "parquet": Format(write_parquet, 32, value_bytes=4),
    "npy": Format(write_npy, 32, beside=IDS),
    "csv": Format(partial(write_text, separator=","), 32, value_bytes=TEXT_VALUE_BYTES),
    "tsv": Format(partial(write_text, separator="\t"), 32, value_bytes=TEXT_VALUE_BYTES),
    "h5ad": Format(write_h5ad, 128),
    "h5": Format(write_h5, 400, beside=NAMES),
    "h5_residues": Format(partial(write_h5, per_residue=True), 400, beside=NAMES, per_residue=True),
    "faiss": Format(write_faiss, 32, beside=IDS, value_bytes=4),
    "pt": Format(write_pt, 1800, value_bytes=4, is_folder=True),
}
BESIDE = {name: form.beside for name, form in FORMATS.items() if form.beside}
