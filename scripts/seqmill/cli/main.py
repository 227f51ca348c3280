"""`seqmill NAME ...`: each program of the workflow as a subcommand."""

import argparse
import sys
from importlib import import_module
from typing import NoReturn

from seqmill.cli.program import exit_code_of

# The workflow, then its programs in the order of the pipeline.
PROGRAMS = {
    "run": "run the whole workflow, in any folder",
    "fetch_weights": "download the weights of a released model and test them",
    "plan": "forecast what a run needs: shards, time, disk, memory",
    "build_index": "read a FASTA file: validate, deduplicate, tokenize, pack",
    "embed_shard": "compute the embeddings of one shard of an index",
    "merge_shards": "verify all shards and merge them in the order of the FASTA",
    "report": "write a report on a result as a page of HTML",
    "export": "write embeddings in another program's format",
    "search": "find the nearest neighbors among embeddings",
    "watch": "show how far runs have come",
    "doctor": "check results and name the next step",
}
USAGE = "\n".join(
    [
        "usage: seqmill NAME [options]\n",
        *(f"  {name:<15}{line}" for name, line in PROGRAMS.items()),
        "\n`seqmill NAME --help` explains the options.",
    ]
)


def main() -> None:
    """Run the program that the first argument names, and exit."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(USAGE)
    elif name in PROGRAMS:
        del sys.argv[1]
        launch(name, f"seqmill {name}")
    else:
        sys.exit(f"{USAGE}\n\nseqmill: {name!r} is none of these names" if name else USAGE)


def launch(name: str, usage_name: str | None = None) -> NoReturn:
    """Run a program and exit. A launcher scripts/NAME.py needs no more, and works without installing the package.

    The module `seqmill.cli.NAME` has `add_options`, `work`, and perhaps `KEPT` (see `exit_code_of`).
    """
    module = import_module(f"seqmill.cli.{name}")
    parser = argparse.ArgumentParser(usage_name, description=module.__doc__)
    module.add_options(parser)
    arguments = parser.parse_args()
    if sys.stdout is not None:  # closed
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold any bytes
    try:
        sys.exit(exit_code_of(lambda: module.work(arguments), getattr(module, "KEPT", "")))
    except argparse.ArgumentTypeError as error:  # options that do not go together
        parser.error(str(error))
