"""The datasets to embed: from the table, or from one FASTA file."""

import csv
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from seqmill.errors import SeqmillError
from seqmill.index.fasta import FastaFile
from seqmill.spec.models import ModelSource, find_model
from seqmill.store.layout import RunFolder

COLUMNS = ("dataset", "fasta", "model")  # the last may be missing
FASTA_SUFFIXES = (".gz", ".bgz", ".zst", ".fasta", ".fa", ".faa", ".fna", ".ffn", ".fas", ".fsa", ".pep")
PROBE_BYTES = 4096
LONGEST_NAME = 255  # bytes in the name of a folder


@dataclass(frozen=True)
class Dataset:
    """A FASTA file to embed with a model; `name` is part of the path of its results."""

    name: str
    fasta: Path
    model: ModelSource
    results: Path = field(default=Path("results"), kw_only=True)  # the folder of all results
    logs: Path = field(default=Path("logs"), kw_only=True)

    @property
    def folder(self) -> RunFolder:
        """The results, relative to the working directory."""
        return RunFolder(self.results / self.name / self.model.slug, self.logs)


def read_datasets(table: Path, default_model: str, folders: list[Path], must_exist: bool = True) -> list[Dataset]:
    """Read the tab-separated table of datasets; raise a SeqmillError with a line for each bad line of the table.

    Its header is dataset, fasta, and perhaps model. Empty lines and lines that begin with # are skipped. A line without
    a model gets `default_model`. `folders` and then the table's own are searched for relative FASTA paths, in this
    order, as by `find_fasta`.
    """
    if not table.is_file():
        raise SeqmillError(f"{table}: no such table of datasets; write one, or give fasta=FILE")
    try:
        lines = table.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SeqmillError(f"{table}: cannot be read as UTF-8 text: {error}; save it as UTF-8") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip() and line[0] != "#"]
    columns = tuple(numbered[0][1].rstrip("\t").split("\t")) if numbered else ()
    if columns not in (COLUMNS, COLUMNS[:-1]):
        raise SeqmillError(
            f"{table}: the first line must be the tab-separated names {', '.join(COLUMNS)}; model may be left out"
        )
    if not numbered[1:]:
        raise SeqmillError(f"{table}: the table has no datasets")
    datasets: dict[RunFolder, Dataset] = {}
    wrong = []
    for number, line in numbered[1:]:
        try:
            dataset = _read_row(line, columns, default_model, [*folders, table.parent], must_exist)
            if dataset.folder in datasets:
                raise SeqmillError(f"dataset {dataset.name} with model {dataset.model.slug} is listed twice")
            datasets[dataset.folder] = dataset
        except (SeqmillError, csv.Error) as error:
            wrong.append(f"{table}: line {number}: {error}")
    if wrong:
        raise SeqmillError("\n".join(wrong))
    return list(datasets.values())


def _read_row(
    line: str, columns: tuple[str, ...], default_model: str, folders: list[Path], must_exist: bool
) -> Dataset:
    (row,) = csv.reader([line], "excel-tab", strict=True)
    name, fasta, model, *more = [*(cell.strip() for cell in row), "", "", ""]
    if not name or not fasta or any(more) or (model and len(columns) < len(COLUMNS)):
        *most, last = (f"a {column}" for column in columns)
        raise SeqmillError(f"expected {', '.join(most)} and {last}, separated by tabs")
    return _named_dataset(name, fasta, model or default_model, folders, must_exist)


def datasets_of_mapping(
    datasets: Mapping[str, str | Mapping[str, str]], default_model: str, folders: list[Path], must_exist: bool = True
) -> list[Dataset]:
    """Return the datasets of the settings: by name, a FASTA file, or `fasta` and perhaps `model`.

    The arguments are as for `read_datasets`. Raise a SeqmillError with a line for each wrong dataset.
    """
    found: list[Dataset] = []
    wrong = []
    for name, value in ((str(name), value) for name, value in datasets.items()):  # YAML reads 2024 as a number
        row = value if isinstance(value, Mapping) else {"fasta": value}
        try:
            if not isinstance(row.get("fasta"), str):
                raise SeqmillError("give a FASTA file, or fasta and model")
            if name in [dataset.name for dataset in found]:
                raise SeqmillError("is listed twice")
            found.append(_named_dataset(name, row["fasta"], row.get("model") or default_model, folders, must_exist))
        except SeqmillError as error:
            wrong.append(f"config datasets: {name}: {error}")
    if wrong:
        raise SeqmillError("\n".join(wrong))
    return found


def _named_dataset(name: str, fasta: str, model: str, folders: list[Path], must_exist: bool) -> Dataset:
    if safe_name(name) != name:
        raise SeqmillError(f"dataset {name!r}: use letters, digits, '.', '_' and '-' only; it names a folder")
    if len(name.encode()) > LONGEST_NAME:
        raise SeqmillError(f"dataset {name[:20]}...: the name is too long; it names a folder")
    return _dataset(name, find_fasta(fasta, folders, must_exist), model)


def dataset_of_file(fasta: str, model: str, folders: list[Path], must_exist: bool = True) -> Dataset:
    """Return a dataset named after its FASTA file."""
    path = find_fasta(fasta, folders, must_exist)
    name = path.name
    while Path(name).suffix.lower() in FASTA_SUFFIXES:
        name = Path(name).stem
    return _dataset(safe_name(name), path, model)


def _dataset(name: str, fasta: Path, model: str) -> Dataset:
    try:
        source = find_model(model)
    except (OSError, ValueError) as error:  # a name too long for a path, a NUL
        raise SeqmillError(f"model {model[:100]!r}: {error}") from error
    for path in (fasta, source.path or ""):
        require_no_braces(str(path))
    return Dataset(name, fasta, source)


def require_no_braces(name: str) -> None:
    """Raise a SeqmillError if Snakemake would read wildcards in a path."""
    if "{" in name or "}" in name:
        raise SeqmillError(f"{name}: Snakemake takes braces for wildcards; rename the file or link to it")


def safe_name(name: str) -> str:
    """Return a name that can be a folder: letters of any script, digits, '.', '_', '-'; the rest becomes '_'."""
    return re.sub(r"[^\w.-]+", "_", name).lstrip(".-") or "dataset"


def find_fasta(fasta: str, folders: list[Path], must_exist: bool = True) -> Path:
    """Return the first folder/fasta that exists; unless it `must_exist`, else that in the first folder.

    Raise a SeqmillError if no folder has it, it can't be read, or it does not begin like FASTA.
    """
    for folder in folders:
        try:
            path = folder / Path(fasta).expanduser()
            exists = path.exists()
        except (RuntimeError, OSError, ValueError) as error:  # ~nobody, a name too long, a closed folder, a NUL
            raise SeqmillError(f"{fasta}: {error}") from error
        if exists:
            if path.is_dir():
                raise SeqmillError(f"{path}: is a folder, not a FASTA file")
            next(FastaFile(path).blocks(PROBE_BYTES))
            return path
    if not must_exist:
        return folders[0] / Path(fasta).expanduser()
    looked = ", ".join(dict.fromkeys(str(folder.resolve()) for folder in folders))
    raise SeqmillError(f"{fasta}: no such FASTA file (looked in {looked})")


def refuse_shared_folders(folders: list[Path]) -> None:
    """Raise a SeqmillError if two results folders are the same through a link: each would replace the other's files."""
    seen: dict[str, Path] = {}
    for folder in folders:
        other = seen.setdefault(os.path.realpath(folder), folder)
        if other != folder:
            raise SeqmillError(
                f"{folder} and {other} are the same folder, through a link; remove the link, or rename one dataset"
            )
