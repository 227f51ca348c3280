"""Commands for error messages and next steps, which users paste into a shell."""

import os
import shlex
import shutil
import sys
from pathlib import Path

SCRIPTS = Path(__file__).absolute().parents[2]  # the folder of the launchers, in a clone
USER_PATH = "SEQMILL_USER_PATH"  # the workflow keeps the PATH here before it puts its own Python first
LAUNCHERS = {"index": "build_index", "shard": "embed_shard", "merge": "merge_shards", "fetch": "fetch_weights"}


def command(name: str, *arguments: str) -> str:
    """Return the command line for a subcommand of seqmill that works in any folder and in the current environment.

    It is `seqmill NAME` if the PATH has this environment's command. Otherwise it runs the launcher in scripts/ of a
    clone, or the installed package. Paths among the arguments must be absolute for the line to work in any folder.
    """
    if is_on_path("seqmill"):
        return shlex.join(["seqmill", name, *arguments])
    python = "python" if is_on_path("python") else sys.executable
    launcher = SCRIPTS / f"{LAUNCHERS.get(name, name)}.py"
    if not launcher.exists():
        return shlex.join([python, "-m", "seqmill", name, *arguments])
    return shlex.join([python, str(launcher), *arguments])


def is_on_path(program: str) -> bool:
    """Return whether the shell would run this environment's `program`, which is in the folder of its Python.

    Links are not followed: the Python of a virtual environment is a link to the one that it was made with.
    """
    found = shutil.which(program, path=os.environ.get(USER_PATH))
    return found is not None and Path(found).absolute().parent == Path(sys.executable).absolute().parent
