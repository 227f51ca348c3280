"""Show how far runs have come, here or on a cluster, until they are complete."""

import argparse
import sys

from seqmill.cli import program
from seqmill.errors import SeqmillError

EPILOG = """examples:
  seqmill watch
  seqmill watch results/proteins --once
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    program.add_results_argument(parser)
    parser.add_argument(
        "--interval", type=program.seconds, help="seconds between two looks (default: 2 on a terminal, else 60)"
    )
    parser.add_argument("--once", action="store_true", help="look once and end")


def work(arguments: argparse.Namespace) -> None:
    try:
        from seqmill.run.watch import watch
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "rich":  # which no worker needs
            raise
        raise SeqmillError("watch needs rich: pip install 'seqmill[workflow]' (or rich)") from error

    interval = arguments.interval if arguments.interval is not None else 2.0 if sys.stdout.isatty() else 60.0
    watch(arguments.results, interval, arguments.once, sys.stdout)
