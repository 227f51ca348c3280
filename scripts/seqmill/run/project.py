"""A run as the workflow sees it: its datasets, and which of their files are stale.

Paths are relative to the current directory, which is the workflow's working directory.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from seqmill.base.files import whole_or_absent
from seqmill.base.input_files import DIGESTS, KnownDigests
from seqmill.base.machine import visible_gpus
from seqmill.errors import SeqmillError
from seqmill.run.dataset_run import DatasetRun
from seqmill.run.datasets import (
    Dataset,
    dataset_of_file,
    datasets_of_mapping,
    read_datasets,
    refuse_shared_folders,
    require_no_braces,
)
from seqmill.run.reuse_checks import require_ready
from seqmill.run.stale import find_fasta_edit, stale_results
from seqmill.store.reuse import open_source

MARK = Path(".snakemake/seqmill.stale")  # newer than the stale files: see `mark_stale`
AGED_SECONDS = 60.0
# CPU cores of a GPU's worker, which launches kernels, stages packs, and writes results in threads of their own.
MOST_GPU_THREADS = 4
CLUSTER_GPU_THREADS = 2  # unless the profile has set-threads: the nodes are not known


class Wildcards(Protocol):
    """What a job of Snakemake knows of its dataset: the name, and the model's slug."""

    dataset: str
    model: str


@dataclass(frozen=True)
class Project:
    """All datasets of a run."""

    runs: Mapping[tuple[str, str], DatasetRun]  # by the dataset's name and the model's slug
    stale: Mapping[Path, str]  # the files that are not what the settings ask for, with the reasons

    @classmethod
    def open(
        cls,
        settings: Mapping[str, Any],
        repository: Path,
        cores: int,
        jobs_get_gpu: bool,
        is_main: bool,
        cluster_threads: int | None = None,
        gpus_at_once: int | None = None,
        results: Path = Path("results"),
        logs: Path = Path("logs"),
        needs_fasta: bool = True,
    ) -> "Project":
        """Read the datasets, and compare what exists with what the settings ask for.

        Args:
            settings: see `check_settings`.
            repository: searched for FASTA files and the table after the working directory.
            cores: CPU cores that the run may use.
            jobs_get_gpu: whether shards get a GPU even if none is visible here.
            is_main: whether this process plans the run. Only then files are stale: a job's own process would see
                results that are half replaced.
            cluster_threads: CPU cores of a shard's job if jobs go to a cluster. Its GPUs are not visible here, so that
                `shards: auto` goes by the tokens.
            gpus_at_once: the GPUs that the run may use at a time, if that is limited.
            results, logs: the folders of all results and of their logs.
            needs_fasta: whether the FASTA files must exist; else Snakemake says so if no rule makes them.

        Raise a SeqmillError or an OSError if the settings, the datasets and the existing results do not fit.
        """
        datasets = _datasets(settings, repository, needs_fasta)
        planned = [DatasetRun.of(replace(dataset, results=results, logs=logs), settings) for dataset in datasets]
        refuse_shared_folders([run.folder.path for run in planned])
        digests = KnownDigests(Path(DIGESTS))
        edited = [bool(find_fasta_edit(run.folder.path, run.fasta, digests)) for run in planned]
        gpus = [] if settings["device"] == "cpu" else visible_gpus()
        use_gpu = settings["device"] != "cpu" and (settings["device"] == "cuda" or bool(gpus) or jobs_get_gpu)
        at_once = min((number for number in (len(gpus), gpus_at_once) if number), default=1)
        gpu_threads = CLUSTER_GPU_THREADS if cluster_threads is not None else share_of_gpu(cores, at_once)
        planned = [replace(run, use_gpu=use_gpu, cores=cores, gpu_threads=gpu_threads) for run in planned]
        sources = [open_source(_reusable(name, planned)) for name in settings["reuse"]]
        runs = [
            replace(run, reused=run.choose_reused(sources, is_edited))
            for run, is_edited in zip(planned, edited, strict=True)
        ]
        for source in sources:
            if not any(source.path in run.reused for run in runs):
                raise SeqmillError(
                    f"{source.path}: can't be reused: its model is {source.attributes['model']}, and no dataset has a "
                    "model of that family; take it out of reuse"
                )
        runs = [
            replace(run, world_size=_world_size(run, is_edited, len(gpus), cluster_threads, is_main))
            for run, is_edited in zip(runs, edited, strict=True)
        ]
        stale = find_stale(runs, digests) if is_main else {}
        return cls({(run.name, run.model.slug): run for run in runs}, stale)

    def __getitem__(self, wildcards: Wildcards) -> DatasetRun:
        asked = (wildcards.dataset, wildcards.model)
        if asked not in self.runs:
            known = ", ".join("/".join(names) for names in self.runs)
            raise SeqmillError(f"no dataset has the results {'/'.join(asked)}; there are {known}")
        return self.runs[asked]

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

    def describe_weights(self) -> list[str]:
        """Return where the released models are that need no fetching; raise a SeqmillError if no dataset has any."""
        models = {run.model.name: run.model for run in self if run.model.kind == "released"}
        if not models:
            used = ", ".join(sorted({run.model.name for run in self}))
            raise SeqmillError(f"nothing to fetch: no dataset uses a released model, only {used}")
        return [f"{name}: on this disk already: {model.path}" for name, model in models.items() if model.is_on_disk]

    def are_current(self, paths: Iterable[Path]) -> bool:
        """Return whether the files exist and are what the settings ask for."""
        return all(path.exists() and path not in self.stale for path in paths)

    def require_reused(self, outputs: Iterable[Path]) -> None:
        """Raise a SeqmillError if an earlier result that a job needs has changed, or is among the jobs' `outputs`.

        This must be known before any job runs: Snakemake deletes the old results when it starts a merge.
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


def share_of_gpu(cores: int, num_gpus: int) -> int:
    """Return the CPU cores for each of so many GPUs, 1 to MOST_GPU_THREADS."""
    return min(max(cores // num_gpus, 1), MOST_GPU_THREADS)


def _world_size(run: DatasetRun, is_edited: bool, num_gpus: int, cluster_threads: int | None, is_main: bool) -> int:
    """Return the number of shards: the known one, or else by size on a cluster, and one per GPU on one machine."""
    if known := run.known_world_size(is_edited):
        return known
    if cluster_threads is None:
        return max(num_gpus, 1)
    shards, reason = run.split_for_cluster(cluster_threads, is_edited)
    if is_main:
        print(f"seqmill: {reason}", file=sys.stderr)
    return shards


def _datasets(settings: Mapping[str, Any], repository: Path, needs_fasta: bool) -> list[Dataset]:
    """Return the dataset of the setting `fasta`, or else those of `datasets`; raise as `Project.open`."""
    folders = [Path(), repository]
    if settings["fasta"]:
        return [dataset_of_file(settings["fasta"], settings["model"], folders, needs_fasta)]
    if isinstance(settings["datasets"], Mapping):
        return datasets_of_mapping(settings["datasets"], settings["model"], folders, needs_fasta)
    table = Path(settings["datasets"])
    if not table.exists() and (repository / table).exists():
        table = repository / table
    return read_datasets(table, settings["model"], folders, needs_fasta)


def find_stale(runs: Iterable[DatasetRun], digests: KnownDigests) -> dict[Path, str]:
    """Return the files that are not what the settings ask for, with the reasons; make Snakemake repeat their jobs."""
    stale: dict[Path, str] = {}
    made: list[Path] = []
    for run in runs:
        reasons = stale_results(run.folder.path, run.request, run.shards, digests)
        if reasons:
            print(f"seqmill: {run.folder.path} will be computed again: {next(iter(reasons.values()))}", file=sys.stderr)
        stale |= reasons
        made += [run.folder.index, *run.folder.merged, *run.shards]
    mark_stale(MARK, stale, made)
    digests.save()
    return stale


def mark_stale(mark: Path, reasons: Mapping[Path, str], made: Iterable[Path]) -> None:
    """Make Snakemake repeat the jobs of stale files: `mark`, an input of their rules, becomes newer than they are.

    A modification time in the future, left by a clock that was set back, moves to the past for all files that are
    `made`, if they exist: Snakemake treats an output that is older than its input as a failure.
    """
    now = time.time()
    for path in made:
        with suppress(FileNotFoundError):
            if path.stat().st_mtime >= now:
                os.utime(path, (now, now - AGED_SECONDS))
    if reasons or not mark.exists():
        mark.parent.mkdir(parents=True, exist_ok=True)
        # Snakemake compares small files by their bytes as well, so the time goes into the file.
        lines = [f"{time.time_ns()}", *(f"{path}: {reason}" for path, reason in reasons.items())]
        with whole_or_absent(mark) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")


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
