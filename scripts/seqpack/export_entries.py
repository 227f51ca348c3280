"""Exports with an entry a record: an HDF5 dataset as UniProt and ProtTrans publish, a .pt file as fair-esm writes."""

from __future__ import annotations

import csv
import glob
import gzip
import os
import shutil
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

from seqpack.embeddings import Embeddings
from seqpack.errors import SeqpackError
from seqpack.export_blocks import read_blocks, read_ids
from seqpack.export_names import UniqueNames, dataset_name, file_name
from seqpack.files import fsync, whole_or_absent
from seqpack.hdf5 import new_hdf5

NAME_COLUMNS = ("name", "id", "row")
# fair-esm calls the first token bos; the mean over all tokens of nucleotides is a mean as well.
REPRESENTATIONS = {"cls": "bos", "mean_tokens": "mean"}


def names_path(output: Path) -> Path:
    """Return where the table of names of a per-record HDF5 file is; that of a folder lies in it, as names.tsv."""
    return output.with_name(output.name + ".names.tsv")


def write_h5(embeddings: Embeddings, output: Path, per_residue: bool = False) -> None:
    """Write a dataset (hidden_dim,) a record at the root, with the id in its attribute `original_id`.

    UniProt's files have accessions as names (help page "Protein Embeddings"), those of bio_embeddings the attribute.
    The attributes of the whole are those of the embeddings file. With `per_residue` the datasets are the vectors of
    residues, (residues, hidden_dim).
    """
    with (
        whole_or_absent(output) as temporary,
        whole_or_absent(names_path(output)) as names,
        names.open("w", encoding="utf-8", newline="") as text,
        new_hdf5(temporary) as file,
    ):
        file.attrs.update(embeddings.attrs)
        table = csv.writer(text, delimiter="\t", lineterminator="\n")
        table.writerow(NAME_COLUMNS)
        unique = UniqueNames(read_ids(embeddings), dataset_name)
        for block in read_blocks(embeddings):
            for row, (id_, vector) in enumerate(zip(block.ids, block.vectors, strict=True), start=block.start):
                name = unique.next(id_)
                values = embeddings.residues(row) if per_residue else vector
                file.create_dataset(name, data=values).attrs["original_id"] = id_
                table.writerow((name, id_, row))


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
                torch.save(entry, folder / f"{name}.pt")
                table.writerow((name, id_, row))


def read_descriptions(path: Path) -> Iterator[tuple[str, int, str]]:
    """Yield the id, the row and the description of each record of a records.tsv.gz that has a row.

    Raises:
        SeqpackError: absent, damaged, or another table.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as text:
            for record in csv.DictReader(text, delimiter="\t"):
                if record["row"]:
                    yield record["id"], int(record["row"]), record["description"]
    except (OSError, EOFError, ValueError, KeyError, csv.Error, zlib.error) as error:
        raise SeqpackError(f"{path}: not a readable records.tsv.gz: {error!r}") from error


def _label(id_: str, row: int, record: tuple[str, int, str] | None, records: Path | None) -> str:
    if record is None:
        return id_
    if record[:2] != (id_, row):
        raise SeqpackError(f"{records}: row {row} is {record[0]!r} there, {id_!r} in the embeddings: of another merge?")
    return f"{id_} {record[2]}".strip()


@contextmanager
def whole_folder_or_absent(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path` if the block succeeds, else remove it.

    Raises:
        SeqpackError: `path` exists; a folder that may hold something else is not replaced.
    """
    _refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    for left in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(host)}.*.tmp"):
        if not Path("/proc", left.name.split(".")[-2]).exists():
            shutil.rmtree(left, ignore_errors=True)
    temporary = path.with_name(f".{path.name}.{host}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        os.sync()  # once, not once a file: there may be millions
        _refuse_existing(path)
        temporary.replace(path)
        fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise SeqpackError(f"{path}: exists; remove it, or name another folder")
