"""A run as the workflow sees it: its datasets, which of their files are stale, and the GPUs.

Paths are relative to the current directory, which is the workflow's working directory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from seqmill.base.input_files import DIGESTS, KnownDigests
from seqmill.base.machine import visible_gpus
from seqmill.errors import SeqmillError
from seqmill.run.dataset_run import DatasetRun, require_no_braces
from seqmill.run.datasets import dataset_of_file, read_datasets, refuse_shared_folders
from seqmill.run.rerun import mark_stale
from seqmill.run.reuse import require_ready
from seqmill.run.stale import find_fasta_edit, stale_results
from seqmill.store.reuse import open_source

MARK = Path(".snakemake/seqmill.stale")  # newer than the stale files: see `mark_stale`


class Wildcards(Protocol):
    """What a job of Snakemake knows of its dataset: the name, and the model's slug."""

    dataset: str
    model: str


@dataclass(frozen=True)
class Project:
    """All datasets of a run.

    Attributes:
        runs: by the dataset's name and the model's slug.
        use_gpu: whether shards are computed on GPUs.
        cores: CPU cores that the run may use.
        stale: the reasons by the paths of existing files that are not what the settings ask for.
    """

    runs: Mapping[tuple[str, str], DatasetRun]
    use_gpu: bool = False
    cores: int = 1
    stale: Mapping[Path, str] = field(default_factory=dict)

    @classmethod
    def open(
        cls, settings: Mapping[str, Any], repository: Path, cores: int, jobs_get_gpu: bool, is_main: bool
    ) -> Project:
        """Read the datasets, and compare what exists with what the settings ask for.

        Args:
            settings: those of `check_settings`.
            repository: holds the demo's table and its FASTA files.
            cores: CPU cores that the run may use.
            jobs_get_gpu: whether shards get a GPU even if none is visible here.
            is_main: whether this process plans the run. A job's own process would see results that are half replaced,
                so it judges nothing.

        Raises:
            SeqmillError: the settings, the datasets and the earlier results do not fit.
            OSError: a file can't be read.
        """
        planned, digests = read_runs(settings, repository), KnownDigests(Path(DIGESTS))
        edited = [bool(find_fasta_edit(run.folder.path, run.fasta, digests)) for run in planned]
        gpus = [] if settings["device"] == "cpu" else visible_gpus()
        use_gpu = settings["device"] != "cpu" and (settings["device"] == "cuda" or bool(gpus) or jobs_get_gpu)
        sources = [open_source(_reusable(name, planned)) for name in settings["reuse"]]
        runs = [
            replace(
                run,
                world_size=run.choose_world_size(len(gpus), is_edited),
                reused=run.choose_reused(sources, is_edited),
                use_gpu=use_gpu,
                cores=cores,
            )
            for run, is_edited in zip(planned, edited, strict=True)
        ]
        for source in sources:
            if not any(source.path in run.reused for run in runs):
                raise SeqmillError(
                    f"{source.path}: can't be reused: it was made with {source.attributes['model']}, and no dataset has a "
                    "model of that family; take it out of reuse"
                )
        stale = find_stale(runs, digests) if is_main else {}
        return cls({(run.name, run.model.slug): run for run in runs}, use_gpu, cores, stale)

    @property
    def shard_threads(self) -> int:
        """The CPU cores of a shard's worker."""
        return 1 if self.use_gpu else self.cores

    def __getitem__(self, wildcards: Wildcards) -> DatasetRun:
        return self.runs[wildcards.dataset, wildcards.model]

    def __iter__(self) -> Iterator[DatasetRun]:
        return iter(self.runs.values())

    @property
    def targets(self) -> list[Path]:
        """What the workflow makes by default."""
        embeddings, reports = [run.folder.embeddings for run in self], [run.folder.report for run in self]
        exports, shards = (path for run in self for path in run.exports), (path for run in self for path in run.shards)
        return [*embeddings, *exports, *reports, *shards]

    @property
    def weights(self) -> list[Path]:
        """The files of released models, which can be fetched."""
        return sorted({path for run in self if run.model.kind == "released" for path in run.model.files})

    def are_current(self, paths: Iterable[Path]) -> bool:
        """Return whether the files exist and are what the settings ask for."""
        return all(path.exists() and path not in self.stale for path in paths)

    def require_reused(self, outputs: Iterable[Path]) -> None:
        """Raise a SeqmillError if an earlier result that a job needs has changed, or would be replaced by another job.

        This must be known before any job runs: Snakemake deletes the results of the merge when it starts one.

        Args:
            outputs: the files that the jobs of this run will make.
        """
        made = set(outputs)
        replaced = {path.resolve() for path in made}
        for run in self:
            if made.isdisjoint((run.folder.index, run.folder.embeddings)):
                continue
            for path in run.reused:
                if path.resolve() in replaced:
                    raise SeqmillError(
                        f"{path}: this run would replace it, and {run.folder.path} takes vectors from it: run dataset "
                        f"{run.name} by itself first"
                    )
            require_ready(run.folder.index, run.reused, run.settings["dtype"], run.folder.index not in made)


def read_runs(settings: Mapping[str, Any], repository: Path) -> list[DatasetRun]:
    """Return the datasets of the setting `fasta`, or else of the table, before it is known which of their files exist.

    Raises:
        SeqmillError: a dataset can't be read, or the settings do not suit it.
    """
    folders = [Path(), repository]
    if settings["fasta"]:
        datasets = [dataset_of_file(settings["fasta"], settings["model"], folders)]
    else:
        table = Path(settings["datasets"])
        if not table.exists() and (repository / table).exists():
            table = repository / table
        datasets = read_datasets(table, settings["model"], folders)
    runs = [DatasetRun.of(dataset, settings) for dataset in datasets]
    refuse_shared_folders([run.folder.path for run in runs])
    return runs


def find_stale(runs: Iterable[DatasetRun], digests: KnownDigests) -> dict[Path, str]:
    """Return the files that are not what the settings ask for, with the reasons; make Snakemake repeat their jobs."""
    stale: dict[Path, str] = {}
    made: list[Path] = []
    for run in runs:
        reasons = stale_results(run.folder.path, run.request, run.shards, digests)
        if reasons:
            print(
                f"seqmill: {run.folder.path} will be computed again: {next(iter(reasons.values()))}", file=sys.stderr
            )
        stale |= reasons
        made += [run.folder.index, *run.folder.merged, *run.shards]
    mark_stale(MARK, stale, made)
    digests.save()
    return stale


def _reusable(name: str, runs: Iterable[DatasetRun]) -> Path:
    """Return the path of a file in `reuse`; raise a SeqmillError if it is a result of this run."""
    require_no_braces(name)
    path = Path(name).expanduser()
    if not path.exists():
        raise SeqmillError(f"{name}: no such file; take it out of reuse: finished results do not need it")
    if path.resolve() in [run.folder.embeddings.resolve() for run in runs]:
        raise SeqmillError(
            f"{name}: can't be reused: this run would replace it; move its folder, or copy it and its manifest.json, "
            "to where no dataset's results go, and name that file in reuse"
        )
    return path
