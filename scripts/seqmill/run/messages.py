"""What is said at the end of a run that has failed, by its logs and statuses alone: there may be many of them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from seqmill.base.locks import lock_holder
from seqmill.base.words import in_one_line
from seqmill.errors import SeqmillError
from seqmill.run.walk import entries_of, last_error
from seqmill.store.status import RUNNING, read_status

DOCTOR = Path(__file__).absolute().parents[2] / "doctor.py"
SLACK = 60.0  # seconds by which clocks of a cluster may differ
STATUS = ".status.json"


def failure_message(root: Path, names: Iterable[str], since: float) -> str:
    """Return a line for each of `names` that has failed, and how to see more; empty if none is known to have.

    It doesn't raise: what can't be read is passed over.

    Args:
        root: the working directory of the workflow.
        names: DATASET/MODEL, or what else has logs in a folder of logs/.
        since: when the run began, in seconds since 1970: what has failed before is not told.
    """
    lines = []
    for name in names:
        with suppress(Exception):  # whatever lies there: the errors of the others are to be told
            said = next(_errors(root, name, since - SLACK), "")
            lines += [f"  {in_one_line(name)}: {said}"] if said else []
    if not lines:
        return ""
    command = ["python", "scripts/doctor.py"]
    if root.absolute() != DOCTOR.parents[2]:
        command = ["python", str(DOCTOR), str((root / "results").absolute())]
    return "\n".join(["Failed:", *lines, f"See more: {shlex.join(command)}"])


def _errors(root: Path, name: str, since: float) -> Iterator[str]:
    """Yield the newest error of the logs of a dataset, else which of its workers was killed."""
    logs = _files(root / "logs" / name, ".log", since)
    errors = [error.removeprefix(": ") for log in logs if (error := last_error(log))]
    if errors:
        others = len(errors) - 1
        more = f" (and {others} more log{'s' * (others > 1)} with errors)" if others else ""
        yield errors[0] + more
    for path in _files(root / "results" / name / "shards", STATUS, since):
        shard = path.with_name(path.name.removesuffix(STATUS) + ".h5")
        with suppress(SeqmillError, OSError):
            if read_status(path).status == RUNNING and not lock_holder(shard):
                yield f"{shard.stem}: its worker is gone without a word (killed?)"


def _files(folder: Path, ending: str, since: float) -> list[Path]:
    """Return the files of an ending that were written since a time, the newest first; none if there is no folder."""
    try:
        entries = entries_of(folder)
    except OSError:
        return []
    times = {path: entry.st_mtime_ns for path, entry in entries.items() if entry.st_mtime >= since}
    return [path for path in sorted(times, key=lambda path: (-times[path], path)) if path.name.endswith(ending)]
