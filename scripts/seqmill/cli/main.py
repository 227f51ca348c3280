"""`seqmill NAME ...`: the subcommands. The module of the named one is imported, and no other."""

import argparse
import difflib
import io
import sys
from importlib import import_module
from typing import NoReturn

from seqmill.version import __version__

GROUPS = {
    "whole workflow": {
        "run": "embed a FASTA file: index, shards, merge, exports, report",
        "plan": "forecast what a run needs: shards, time, disk, memory",
        "watch": "show how far runs have come",
        "doctor": "check results and name the next step",
    },
    "models": {
        "models": "list the models: sizes, license, speed, what is on this disk",
        "fetch": "fetch a model's weights and test them",
    },
    "stages": {
        "index": "read a FASTA file: validate, deduplicate, tokenize, pack",
        "shard": "compute the embeddings of one shard of an index",
        "merge": "verify all shards and merge them in the order of the FASTA",
    },
    "results": {
        "export": "write embeddings in another program's format",
        "report": "write a report on a result as a page of HTML",
        "search": "find the nearest neighbors among embeddings",
    },
    "shell": {
        "completion": "print a script with which bash or zsh complete this command",
    },
}
COMMANDS = {name: line for group in GROUPS.values() for name, line in group.items()}
EXAMPLES = """\
examples:
  seqmill run proteins.faa --model esm2_t33_650M_UR50D
  seqmill doctor results
  seqmill search --query a/embeddings.h5 --target b/embeddings.h5 --output neighbors.tsv"""
EXIT_CODES = """\
exit codes:
  0      done; doctor: everything is complete and sound
  1      an error, told in one line; doctor: something is not complete or not sound
  2      wrong usage
  130    stopped by Ctrl-C
  128+N  stopped by signal N
  run    ends with Snakemake's exit code, which is 1 after Ctrl-C"""


def usage() -> str:
    """Return what `seqmill --help` prints."""
    lines = ["usage: seqmill NAME [options]", "       seqmill NAME --help", "       seqmill --version", ""]
    for title, group in GROUPS.items():
        lines += [f"{title}:", *(f"  {name:<12}{line}" for name, line in group.items()), ""]
    return "\n".join([*lines, EXAMPLES, "", EXIT_CODES])


def main() -> None:
    """Run the subcommand that the first argument names, and exit."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"seqmill {__version__}")
    elif name in COMMANDS:
        del sys.argv[1]
        launch(name, f"seqmill {name}")
    else:
        print(f"seqmill: {_unknown(name)}" if name else usage(), file=sys.stderr)
        sys.exit(2)


def launch(name: str, usage_name: str | None = None) -> NoReturn:
    """Run a subcommand and exit. A launcher in scripts/ needs no more, and works without installing the package.

    The module `seqmill.cli.NAME` has `add_options`, `work`, and perhaps `KEPT` (see `exit_code_of`).
    """
    from seqmill.cli.program import exit_code_of

    module = import_module(f"seqmill.cli.{name}")
    parser = make_parser(name, usage_name)
    arguments = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):  # or None, if it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold any bytes
    try:
        sys.exit(exit_code_of(lambda: module.work(arguments), getattr(module, "KEPT", "")))
    except argparse.ArgumentTypeError as error:  # options that do not go together
        parser.error(str(error))


def make_parser(name: str, usage_name: str | None = None) -> argparse.ArgumentParser:
    """Return a subcommand's parser; its description is the docstring of its module."""
    module = import_module(f"seqmill.cli.{name}")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage_name, description=module.__doc__, formatter_class=formatter)
    module.add_options(parser)
    return parser


def _unknown(name: str) -> str:
    if name.startswith("-"):
        return f"no option {name}; `seqmill --help` lists the subcommands"
    close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)  # build_index is near index
    hint = f"; did you mean {close[0]}?" if close else "."
    return f"no subcommand {name!r}{hint} `seqmill --help` lists them"
