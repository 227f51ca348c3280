"""Show how far runs have come, here or on a cluster, until they are complete."""

import argparse
import sys

from seqmill.cli import program

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
    from seqmill.run.watch import watch  # imports rich, which readers of results may lack

    interval = arguments.interval if arguments.interval is not None else 2.0 if sys.stdout.isatty() else 60.0
    watch(arguments.results, interval, arguments.once, sys.stdout)
