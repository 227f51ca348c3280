"""The summary at the end of a run: where its results are, or which datasets failed and why."""

import json
import shlex
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from seqmill.base.commands import command
from seqmill.base.locks import lock_holder
from seqmill.base.words import in_one_line
from seqmill.errors import SeqmillError
from seqmill.run.datasets import Dataset
from seqmill.run.walk import entries_of, last_error
from seqmill.spec.models import DNABERT_S
from seqmill.store.index_format import ARE_INVALID
from seqmill.store.layout import RunFolder
from seqmill.store.status import RUNNING, read_status

SLACK = 60.0  # seconds by which clocks of a cluster may differ
STATUS = ".status.json"


def results_message(datasets: Iterable[Dataset], is_elsewhere: bool) -> str:
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
        if number := counts.get("num_invalid"):
            warnings.append(
                f"\nINVALID: {number} records of {name} {ARE_INVALID} and were left out; {folder.records} names them"
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


def _trained_run(dataset: Dataset, is_elsewhere: bool) -> str:
    """Return a command that embeds a dataset with a trained model."""
    model = "dnabert_s" if dataset.model.family == DNABERT_S else "esm2_t33_650M_UR50D"
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


def failure_message(root: Path, names: Iterable[str], since: float) -> str:
    """Return a line for each of `names` that has failed, and how to see more; empty if none has.

    It looks at logs and statuses alone, as there may be many. It does not raise: unreadable files are skipped. A name
    is DATASET/MODEL, or another folder in `root`/logs. Failures before `since`, in seconds since 1970, do not count.
    """
    lines = []
    for name in names:
        with suppress(Exception):  # the errors of the others must still be shown
            said = next(_errors(root, name, since - SLACK), "")
            lines += [f"  {in_one_line(name)}: {said}"] if said else []
    if not lines:
        return ""
    return "\n".join(["Failed:", *lines, f"See more: {command('doctor', str((root / 'results').absolute()))}"])


def _errors(root: Path, name: str, since: float) -> Iterator[str]:
    """Yield the newest error in the logs of a dataset, then its killed workers."""
    logs = _files(root / "logs" / name, ".log", since)
    errors = [error.removeprefix(": ") for log in logs if (error := last_error(log))]
    if errors:
        others = len(errors) - 1
        more = f" (and {others} more log{'s' * (others > 1)} with errors)" if others else ""
        yield errors[0] + more
    for path in _files(RunFolder(root / "results" / name).shards, STATUS, since):
        shard = path.with_name(path.name.removesuffix(STATUS) + ".h5")
        with suppress(SeqmillError, OSError):
            if read_status(path).status == RUNNING and not lock_holder(shard):
                yield f"{shard.stem}: its worker has ended without a message (killed?)"


def _files(folder: Path, ending: str, since: float) -> list[Path]:
    """Return the files with an ending that were written since a time, newest first; none if there is no folder."""
    try:
        entries = entries_of(folder)
    except OSError:
        return []
    times = {path: entry.st_mtime_ns for path, entry in entries.items() if entry.st_mtime >= since}
    return [path for path in sorted(times, key=lambda path: (-times[path], path)) if path.name.endswith(ending)]
