"""Exports with an entry per record: HDF5 as UniProt and ProtTrans publish it, .pt files as fair-esm writes them."""

import csv
import io
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from seqmill.base.files import name_errors, whole_folder_or_absent, whole_or_absent
from seqmill.base.hdf5 import new_hdf5
from seqmill.base.imports import importing_much
from seqmill.errors import SeqmillError
from seqmill.export.names import NAMES, file_name, hdf5_name, unique_names, whole_export
from seqmill.store.embeddings import EmbeddingsFile, read_blocks, read_ids

NAME_COLUMNS = ("name", "id", "row")
CHECKED_ROWS = 256  # how often to check for a full disk and for signals
# fair-esm calls the first token bos; for nucleotides, the mean over all tokens is a mean as well.
REPRESENTATIONS = {"cls": "bos", "mean_tokens": "mean"}


def write_h5(embeddings: EmbeddingsFile, output: Path, records: Path | None = None, per_residue: bool = False) -> None:
    """Write a dataset (hidden_dim,) per record at the root, with the id in its attribute `original_id`.

    UniProt's files have accessions as names (help page "Protein Embeddings"), those of bio_embeddings the attribute.
    The file has the attributes of the embeddings file. With `per_residue` the datasets are the vectors of residues,
    (residues, hidden_dim). The table of names is written next to the output.
    """
    names = output.with_name(output.name + NAMES)
    with (
        whole_or_absent(names) as new_names,
        new_names.open("w", encoding="utf-8", newline="") as text,
        whole_export(output, names) as temporary,
        new_hdf5(temporary) as file,
    ):
        file.attrs.update(embeddings.attrs)
        table = csv.writer(text, delimiter="\t", lineterminator="\n")
        table.writerow(NAME_COLUMNS)
        unique = unique_names(partial(read_ids, embeddings), hdf5_name)
        for block in read_blocks(embeddings):
            named = [(next(unique), id_, row) for row, id_ in enumerate(block.ids, start=block.start)]
            for (name, id_, row), vector in zip(named, block.vectors, strict=True):
                values = embeddings.residues(row) if per_residue else vector
                file.create_dataset(name, data=values).attrs["original_id"] = id_
                if row % CHECKED_ROWS == 0:
                    file.check()
            with name_errors(names):
                table.writerows(named)
                text.flush()


def write_pt(embeddings: EmbeddingsFile, output: Path, records: Path | None = None) -> None:
    """Write a folder with a NAME.pt per record, as fair-esm's scripts/extract.py does, and names.tsv.

    Each file holds `label` (the id, with `records` the whole header, as in fair-esm) and `mean_representations` (for
    other poolings `bos_representations`, `max_representations` ...), a dict from the layer's number to a float32 tensor
    (hidden_dim,). If the embeddings file has vectors of residues, it also holds `representations`, to a tensor
    (residues, hidden_dim).
    """
    with importing_much():
        import torch

    pooling, layer = embeddings.pooling, embeddings.layer
    key = f"{REPRESENTATIONS.get(pooling, pooling)}_representations"
    labels = _headers(embeddings, records) if records else read_ids(embeddings)
    with (
        whole_folder_or_absent(output) as folder,
        (folder / "names.tsv").open("w", encoding="utf-8", newline="") as text,
    ):
        table = csv.writer(text, delimiter="\t", lineterminator="\n")
        table.writerow(NAME_COLUMNS)
        unique = unique_names(partial(read_ids, embeddings), file_name)
        for block in read_blocks(embeddings):
            for row, (id_, vector) in enumerate(zip(block.ids, block.vectors, strict=True), start=block.start):
                entry: dict[str, Any] = {"label": next(labels)}
                if embeddings.has_residues:
                    entry["representations"] = {layer: torch.from_numpy(embeddings.residues(row)).float()}
                # A copy: a view would be saved with the whole block.
                entry[key] = {layer: torch.tensor(vector, dtype=torch.float32)}
                name = next(unique)
                content = io.BytesIO()  # torch.save to a file hides errors of the disk
                torch.save(entry, content)
                # Not a view of its buffer: after a failed write, that crashes Python 3.12 at exit.
                (folder / f"{name}.pt").write_bytes(content.getvalue())
                table.writerow((name, id_, row))


def _headers(embeddings: EmbeddingsFile, path: Path) -> Iterator[str]:
    """Yield the header of each record of the embeddings, from the records.tsv.gz of the same merge."""
    import pandas

    rows, columns = enumerate(read_ids(embeddings)), ["row", "id", "description"]
    form: dict[str, Any] = {
        "sep": "\t",
        "usecols": columns,
        "dtype": str,
        "keep_default_na": False,
        "compression": "gzip",
    }
    try:
        with pandas.read_csv(path, **form, chunksize=4096) as blocks:
            for block in blocks:
                records = block.loc[block["row"] != "", columns].itertuples(index=False)
                for (number, id_, description), (row, expected) in zip(records, rows, strict=False):
                    if (int(number), id_) != (row, expected):
                        here = f"row {row} is {id_!r} here, {expected!r} in the embeddings"
                        raise SeqmillError(f"{path}: {here}; name the records.tsv.gz of the same merge")
                    yield f"{id_} {description}".strip()
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise SeqmillError(f"{path}: not a readable records.tsv.gz: {error!r}") from error
    for row, expected in rows:
        raise SeqmillError(
            f"{path}: has no row {row}, {expected!r} in the embeddings; name the table of the same merge"
        )
