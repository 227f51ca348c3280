"""The commands `seqmill run` that were started in a working directory, to propose them again."""

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from seqmill.base.commands import command
from seqmill.base.files import whole_or_absent

FOLDER = Path(".snakemake/seqmill")  # in the working directory; a file for each command
UNLOCK = "--unlock"


def record_command(root: Path, arguments: Sequence[str], runs: Iterable[str]) -> None:
    """Record that `seqmill run ARGUMENTS` is started in the current folder.

    `root` is the run's working directory. `runs` are the names DATASET/MODEL of its results.
    """
    # Relative paths stay as they are, because Snakemake would take an absolute one for another input.
    started = {"folder": os.path.relpath(Path.cwd(), root.resolve()), "arguments": list(arguments)}
    text = json.dumps({**started, "runs": sorted(runs)})  # as ASCII: arguments may hold any bytes
    with whole_or_absent(root / FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json") as temporary:
        temporary.write_text(text, encoding="ascii")


def command_again(root: Path, run: str, unlock: bool = False) -> str:
    """Return a line for the shell, in any folder, that repeats the last command that made a run; empty without one.

    With `unlock`, it first removes the locks of a Snakemake that was killed.
    """
    files = {path: path.stat().st_mtime_ns for path in (root / FOLDER).glob("*.json")}
    for path in sorted(files, key=files.__getitem__, reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError):  # a damaged file, or a folder that was moved
            started = json.loads(path.read_bytes())
            folder = (root / started["folder"]).resolve(strict=True)
            if run in started["runs"]:
                arguments = started["arguments"]
                lines = [command("run", *arguments)]
                if unlock:
                    options = [UNLOCK] if "--" in arguments else ["--", UNLOCK]
                    lines.insert(0, command("run", *arguments, *options))
                return f"({' && '.join([f'cd {shlex.quote(str(folder))}', *lines])})"
    return ""
