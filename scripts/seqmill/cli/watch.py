"""Show how far runs have come, here or on a cluster, until they are complete."""

import argparse
import sys

from seqmill.cli import program
from seqmill.run.watch import watch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    program.add_results_argument(parser)
    parser.add_argument(
        "--interval", type=program.seconds, help="seconds between two looks (default: 2 on a terminal, else 60)"
    )
    parser.add_argument("--once", action="store_true", help="look once and end")
    arguments = parser.parse_args()
    program.start_log()
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold any bytes
    interval = arguments.interval if arguments.interval is not None else 2.0 if sys.stdout.isatty() else 60.0
    return program.run(lambda: watch(arguments.results, interval, arguments.once, sys.stdout))
