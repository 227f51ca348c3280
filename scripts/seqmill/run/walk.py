"""Finds the runs in a results folder: their files, and the errors in their logs."""

import glob
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from seqmill.base.words import in_one_line
from seqmill.store.layout import SHARD_FILE, RunFolder

UNFINISHED_INDEX = re.compile(r"\.index\.h5\..+\.tmp")
DEPTH = 2  # levels from results/ to a run's folder
TAIL_BYTES = 1 << 16  # read from the end of a log

Files = dict[Path, os.stat_result]


@dataclass(frozen=True)
class FoundRun(RunFolder):
    """A run's folder as it was listed."""

    files: Files = field(default_factory=dict)  # in it and in its folder of shards; none if the folder is gone
    error: OSError | None = None  # why the folder can't be listed

    @property
    def root(self) -> Path:
        """The working directory of the workflow, which a module's prefix may put more levels up."""
        usual = self.path.parent.parent.parent
        return next((folder for folder in (usual, *usual.parents) if exists(folder / ".snakemake")), usual)

    @property
    def has_begun(self) -> bool:
        # The workflow makes the folders of results and logs before it builds the index.
        begun = {self.index, *self.merged} & self.files.keys() or self.world_sizes() or self.time_of_build()
        return bool(begun) or exists(self.logs)

    def time_of(self, path: Path) -> int:
        """Return when a file was modified, in ns; 0 if it was not in the folder."""
        return self.files[path].st_mtime_ns if path in self.files else 0

    def time_of_build(self) -> int:
        """Return when the temporary file of an unfinished index was modified, in ns; 0 if there is none."""
        return max((self.time_of(path) for path in self.files if UNFINISHED_INDEX.fullmatch(path.name)), default=0)

    def world_sizes(self) -> list[int]:
        """Return the number of shards of each set of shards that has files; the set written last comes last."""
        times: dict[int, int] = {}
        for path in self.files:
            match = SHARD_FILE.fullmatch(path.name) if path.parent == self.shards else None
            if match and int(match["rank"]) < (size := int(match["world_size"])):
                times[size] = max(times.get(size, 0), self.time_of(path))
        return sorted(times, key=times.__getitem__)

    def build_error(self) -> str:
        """Return the error of the last index build, as `last_error`; empty if a merge has succeeded since."""
        with suppress(OSError):
            if exists(self.manifest) and self.index_log.stat().st_mtime_ns < self.manifest.stat().st_mtime_ns:
                return ""
        return last_error(self.index_log)


def find_runs(results: Path) -> list[FoundRun]:
    """Return the runs in `results/`, `results/DATASET/` or `results/DATASET/MODEL/`, by path.

    A folder that can't be listed is returned with its error.
    """
    results = results_in(results)
    return sorted([*_walk(results, DEPTH), *_failed_builds(results)], key=lambda run: run.path)


def results_in(folder: Path) -> Path:
    """Return the absolute path of a folder of results; one with results/ or logs/ in it stands for results/."""
    # A symbolic link keeps its own name, which is the dataset's.
    folder = folder.resolve() if ".." in folder.parts else folder.absolute()
    is_root = folder.name != "results" and any(exists(folder / name) for name in ("results", "logs"))
    return folder / "results" if is_root else folder


def _walk(folder: Path, depth: int) -> Iterator[FoundRun]:
    """Yield the runs in a folder, at most `depth` levels down."""
    shards = RunFolder(folder).shards
    try:
        files = entries_of(folder)
        run = FoundRun(folder, files=files | (entries_of(shards) if shards in files else {}))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        yield FoundRun(folder, error=error)
        return
    if run.has_begun:
        yield run
    elif depth:
        for path in (path for path in files if stat.S_ISDIR(files[path].st_mode)):
            yield from _walk(path, depth - 1)


def _failed_builds(results: Path) -> Iterator[FoundRun]:
    """Yield the runs of which Snakemake has removed the folder with the index, so that only a log remains."""
    for given, root in enumerate(results.parents[:3]):
        top = (results, *results.parents)[given]
        if top.name != "results":  # the workflow's folder has that name
            continue
        names = [*map(glob.escape, results.relative_to(top).parts), *["*"] * (DEPTH - given)]
        for log in (root / "logs").glob("/".join([*names, "build_index.log"])):
            run = FoundRun(top / log.parent.parent.name / log.parent.name)
            if not exists(run.path) and last_error(log):
                yield run


def entries_of(folder: Path) -> Files:
    """Return the files in a folder; raise an OSError if it can't be listed."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # just removed, or a broken link
                found[folder / entry.name] = entry.stat()
    return found


def exists(path: Path) -> bool:
    """Return whether a path exists; False, not an error, where this user can't tell."""
    return os.access(path, os.F_OK)


def last_error(log: Path) -> str:
    """Return ": " and the last error of a log in one line; empty if there is none."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - TAIL_BYTES, 0))
        _, found, text = file.read().decode(errors="replace").rpartition(" ERROR ")
        return f": {in_one_line(text)}" if found else ""
    return ""
