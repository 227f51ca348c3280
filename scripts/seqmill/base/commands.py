"""Commands for error messages and next steps, which users paste into a shell."""

import shlex
import shutil
import sys
from pathlib import Path

SCRIPTS = Path(__file__).absolute().parents[2]  # the folder of the launchers, in a clone
LAUNCHERS = {"index": "build_index", "shard": "embed_shard", "merge": "merge_shards", "fetch": "fetch_weights"}


def command(name: str, *arguments: str) -> str:
    """Return the command line for a subcommand of seqmill that works in any folder and in the current environment.

    It is `seqmill NAME` if that command is on the PATH. Otherwise it runs the launcher in scripts/ of a clone, or the
    installed package.
    """
    if shutil.which("seqmill"):
        return shlex.join(["seqmill", name, *arguments])
    found = shutil.which("python")
    python = "python" if found and Path(found).samefile(sys.executable) else sys.executable
    launcher = SCRIPTS / f"{LAUNCHERS.get(name, name)}.py"
    if not launcher.exists():
        return shlex.join([python, "-m", "seqmill", name, *arguments])
    return shlex.join([python, str(launcher), *arguments])
