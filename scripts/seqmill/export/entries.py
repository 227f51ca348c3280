"""Exports with an entry a record: an HDF5 dataset as UniProt and ProtTrans publish, a .pt file as fair-esm writes."""

from __future__ import annotations

import csv
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

from seqmill.base.files import name_errors, whole_folder_or_absent, whole_or_absent
from seqmill.base.hdf5 import new_hdf5
from seqmill.errors import SeqmillError
from seqmill.export.formats import NAMES
from seqmill.export.names import UniqueNames, dataset_name, file_name
from seqmill.export.output_files import whole_export
from seqmill.store.embeddings import Embeddings, read_blocks, read_ids

NAME_COLUMNS = ("name", "id", "row")
CHECKED_ROWS = 256  # after so many entries, is there still room, and no one who wants to stop?
# fair-esm calls the first token bos; the mean over all tokens of nucleotides is a mean as well.
REPRESENTATIONS = {"cls": "bos", "mean_tokens": "mean"}


def write_h5(embeddings: Embeddings, output: Path, records: Path | None = None, per_residue: bool = False) -> None:
    """Write a dataset (hidden_dim,) a record at the root, with the id in its attribute `original_id`.

    UniProt's files have accessions as names (help page "Protein Embeddings"), those of bio_embeddings the attribute.
    The attributes of the whole are those of the embeddings file. With `per_residue` the datasets are the vectors of
    residues, (residues, hidden_dim). Beside it the table of names.
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
        unique = UniqueNames(read_ids(embeddings), dataset_name)
        for block in read_blocks(embeddings):
            named = [(unique.next(id_), id_, row) for row, id_ in enumerate(block.ids, start=block.start)]
            for (name, id_, row), vector in zip(named, block.vectors, strict=True):
                values = embeddings.residues(row) if per_residue else vector
                file.create_dataset(name, data=values).attrs["original_id"] = id_
                if row % CHECKED_ROWS == 0:
                    file.check()
            with name_errors(names):
                table.writerows(named)
                text.flush()


def write_pt(embeddings: Embeddings, output: Path, records: Path | None = None) -> None:
    """Write a folder of NAME.pt as fair-esm's scripts/extract.py does, and names.tsv in it.

    Each file holds `label` (the id, and with `records` the rest of the header, as fair-esm has it) and
    `mean_representations` (of other poolings `bos_representations`, `max_representations` ...), a dict from the
    layer's number to a float32 tensor (hidden_dim,); where the embeddings file has vectors of residues also
    `representations`, to a tensor (residues, hidden_dim).

    Args:
        embeddings: what to write.
        output: the folder to make.
        records: the records.tsv.gz beside the embeddings, for the descriptions.
    """
    import torch

    pooling, layer = embeddings.pooling, embeddings.layer
    key = f"{REPRESENTATIONS.get(pooling, pooling)}_representations"
    descriptions = read_descriptions(records) if records else repeat(None)
    with (
        whole_folder_or_absent(output) as folder,
        (folder / "names.tsv").open("w", encoding="utf-8", newline="") as text,
    ):
        table = csv.writer(text, delimiter="\t", lineterminator="\n")
        table.writerow(NAME_COLUMNS)
        unique = UniqueNames(read_ids(embeddings), file_name)
        for block in read_blocks(embeddings):
            for row, (id_, vector) in enumerate(zip(block.ids, block.vectors, strict=True), start=block.start):
                label = _label(id_, row, next(descriptions, ("", -1, "")), records)
                name = unique.next(id_)
                # A tensor of its own: one of a view would be saved with the whole block.
                values = torch.tensor(vector, dtype=torch.float32)
                entry = {"label": label, key: {layer: values}}
                if embeddings.has_residues:
                    residues = torch.from_numpy(embeddings.residues(row)).float()
                    entry = {"label": label, "representations": {layer: residues}, key: {layer: values}}
                content = io.BytesIO()  # torch's own writing tells no error of the disk from others
                torch.save(entry, content)
                (folder / f"{name}.pt").write_bytes(content.getbuffer())
                table.writerow((name, id_, row))


def read_descriptions(path: Path) -> Iterator[tuple[str, int, str]]:
    """Yield the id, the row and the description of each record of a records.tsv.gz that has a row.

    Raises:
        SeqmillError: absent, damaged, or another table.
    """
    csv.field_size_limit(sys.maxsize)  # else 131,072: shorter than some headers
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as text:
            for record in csv.DictReader(text, delimiter="\t"):
                if record["row"]:
                    yield record["id"], int(record["row"]), record["description"]
    except (OSError, EOFError, ValueError, KeyError, csv.Error, zlib.error) as error:
        raise SeqmillError(f"{path}: not a readable records.tsv.gz: {error!r}") from error


def _label(id_: str, row: int, record: tuple[str, int, str] | None, records: Path | None) -> str:
    if record is None:
        return id_
    if record[:2] != (id_, row):
        raise SeqmillError(f"{records}: row {row} is {record[0]!r} there, {id_!r} in the embeddings: of another merge?")
    return f"{id_} {record[2]}".strip()
