"""Commands of Snakemake for next steps, which users paste into a shell."""

import shlex
from pathlib import Path

from seqmill.run.workflow_files import workflow_folder


def snakemake(root: Path, *arguments: str) -> str:
    """Return the command that runs the workflow in the folder `root`, for the current directory.

    The Snakefile may be elsewhere: in a clone, or in the installed package.
    """
    command = ["snakemake", *arguments]
    if not Path("Snakefile").exists():
        command += ["--snakefile", str(workflow_folder() / "Snakefile")]
    return shlex.join(command if root.absolute() == Path.cwd() else [*command, "--directory", str(root)])
