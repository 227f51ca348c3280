"""The summary at the end of a run: where its results are, or which datasets failed and why."""

import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from seqmill.base.commands import command
from seqmill.base.locks import lock_holder
from seqmill.base.words import in_one_line, many
from seqmill.errors import SeqmillError
from seqmill.run.dataset_run import DatasetRun
from seqmill.run.walk import entries_of, last_error
from seqmill.spec.families import ESM2
from seqmill.spec.models import DEFAULT_MODEL, UNTRAINED_PREFIX
from seqmill.store.index_format import WHY_INVALID
from seqmill.store.layout import RunFolder
from seqmill.store.status import RUNNING, read_status

LOG, STATUS = ".log", ".status.json"


class Stamp(NamedTuple):
    """Changes when a file is written. The clocks of a cluster differ, so two times can't be compared."""

    inode: int
    size: int
    mtime_ns: int


def results_message(datasets: Iterable[DatasetRun], is_elsewhere: bool) -> str:
    """Return where the results are that exist, how to read them, and what their reader must know.

    Paths are absolute if the user started the run in another folder than the current one (`is_elsewhere`).
    """
    done = [dataset for dataset in datasets if dataset.folder.embeddings.exists()]
    if not done:
        return ""
    root = Path.cwd() if is_elsewhere else Path()
    lines, warnings = [], []
    for dataset in done:
        name, folder = dataset.name, RunFolder(root / dataset.folder.path)
        counts = _counts(folder.manifest)
        lines += [
            f"\n{name}: {folder.embeddings}",
            f"    records:                 {_fates_in_words(counts)}",
            f"    the fate of each record: {folder.records}",
            f"    how it was made:         {folder.manifest}",
            f"    at a glance:             {folder.report}",
        ]
        exports = [str(root / path) for path in dataset.exports if path.exists()]
        lines += [f"    {'' if number else 'exports:':<24} {path}" for number, path in enumerate(exports)]
        if number := counts.get("num_invalid"):
            warnings.append(
                f"\nINVALID: {many(number, 'record')} of {name} left out, {WHY_INVALID}; {folder.records} names them"
            )
        if number := counts.get("quarantined"):
            warnings.append(
                f"\nQUARANTINED: {number} records of {name} have no finite embedding and were left out; "
                f"{folder.records} names them"
            )
        if dataset.model.kind == "untrained":
            warnings.append(
                f"\nUNTRAINED WEIGHTS: the embeddings of {name} are random projections without any "
                f"biological meaning.\nFor real ones give a trained model, e.g. {_trained_run(dataset, is_elsewhere)}"
            )
    embeddings = root / done[0].folder.embeddings
    lines.append(f"\nIn Python:\n    import seqmill; e = seqmill.open_embeddings({str(embeddings)!r})")
    return "\n".join([*lines, "    e.ids, e[0], e[e.ids[0]], e.to_pandas()", *warnings])


def _trained_run(dataset: DatasetRun, is_elsewhere: bool) -> str:
    """Return a command that embeds a dataset with a trained model."""
    is_esm2 = dataset.model.family == ESM2  # whose small models are for trials
    model = DEFAULT_MODEL if is_esm2 else dataset.model.name.removeprefix(UNTRAINED_PREFIX)
    if Path("Snakefile").exists():
        return f"snakemake --cores all --config fasta={shlex.quote(str(dataset.fasta))} model={model}"
    fasta, output = (dataset.fasta.absolute(), ["--output", str(Path.cwd())]) if is_elsewhere else (dataset.fasta, [])
    return command("run", str(fasta), "--model", model, *output)


def _fates_in_words(counts: dict[str, int]) -> str:
    """Return how many records have each fate."""
    fates = {fate: count for fate, count in counts.items() if count and fate != "num_invalid"}
    advice = "; the settings max_length and long_sequences change that" if "truncated" in fates else ""
    return (", ".join(f"{count} {fate}" for fate, count in fates.items()) or "unknown") + advice


def _counts(manifest: Path) -> dict[str, int]:
    """Return the number of records of each fate, and num_invalid; none if the manifest can't be read."""
    try:
        counts = json.loads(manifest.read_text())["counts"]
        fates = {str(fate): int(count) for fate, count in counts["fates"].items()}
        return {**fates, "num_invalid": int(counts.get("num_invalid", 0))}  # older results have none
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def stamps_of(results: Path, logs: Path, names: Iterable[str]) -> dict[Path, Stamp]:
    """Return the stamps of the logs and statuses of `names`, see `failure_message`; unreadable files have none."""
    folders = (folder for name in names for folder in _folders(results, logs, name))
    return {path: stamp for folder in folders for path, stamp in _stamps(folder).items()}


def failure_message(results: Path, logs: Path, names: Iterable[str], before: Mapping[Path, Stamp]) -> str:
    """Return a line for each of `names` that has failed, and how to see more; empty if none has.

    It looks at logs and statuses alone, as there may be many. It does not raise: unreadable files are skipped. A name
    is DATASET/MODEL, or another folder in `logs`. `before` are the stamps at the start of the run: files that
    still have them tell of earlier runs.
    """
    lines = []
    for name in names:
        with suppress(Exception):  # the errors of the others must still be shown
            said = next(_errors(_folders(results, logs, name), before), "")
            lines += [f"  {in_one_line(name)}: {said}"] if said else []
    if not lines:
        return ""
    return "\n".join(["Failed:", *lines, f"See more: {command('doctor', str(results.absolute()))}"])


def _errors(folders: tuple[Path, Path], before: Mapping[Path, Stamp]) -> Iterator[str]:
    """Yield the newest error in the logs of a dataset, then its killed workers; `folders` as from `_folders`."""
    logs, statuses = (_written(folder, before) for folder in folders)
    errors = [error.removeprefix(": ") for log in logs if (error := last_error(log))]
    if errors:
        others = len(errors) - 1
        more = f" (and {others} more log{'s' * (others > 1)} with errors)" if others else ""
        yield errors[0] + more
    for path in statuses:
        shard = path.with_name(path.name.removesuffix(STATUS) + ".h5")
        with suppress(SeqmillError, OSError):
            if read_status(path).status == RUNNING and not lock_holder(shard):
                yield f"{shard.stem}: its worker has ended without a message (killed?)"


def _folders(results: Path, logs: Path, name: str) -> tuple[Path, Path]:
    """Return the folders of the logs and of the statuses."""
    return logs / name, RunFolder(results / name).shards


def _written(folder: Path, before: Mapping[Path, Stamp]) -> list[Path]:
    """Return the files in a folder whose stamps are not those of before, newest first."""
    stamps = {path: stamp for path, stamp in _stamps(folder).items() if before.get(path) != stamp}
    return sorted(stamps, key=lambda path: (-stamps[path].mtime_ns, path))


def _stamps(folder: Path) -> dict[Path, Stamp]:
    """Return the stamps of the logs and statuses in a folder; none if it can't be listed."""
    stamps = {}
    with suppress(OSError, ValueError):
        for path in (path for path in entries_of(folder) if path.name.endswith((LOG, STATUS))):
            with suppress(OSError), path.open("rb") as file:  # on NFS, opening a file renews what is known of it
                state = os.fstat(file.fileno())
                stamps[path] = Stamp(state.st_ino, state.st_size, state.st_mtime_ns)
    return stamps
