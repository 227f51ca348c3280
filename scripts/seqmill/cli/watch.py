"""Showing how far runs have come: a table that is drawn in place on a terminal, else a line for what has changed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from seqmill.cli import program
from seqmill.run.watch import watch


def main() -> int:
    """Watch as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="watch", description="Show how far runs have come, here or on a cluster, until they are complete."
    )
    parser.add_argument(
        "results",
        type=Path,
        nargs="?",
        default=Path("results"),
        help="results, results/DATASET or results/DATASET/MODEL (default: results in the current directory)",
    )
    parser.add_argument(
        "--interval", type=program.seconds, help="seconds between two looks (default: 2 on a terminal, else 60)"
    )
    parser.add_argument("--once", action="store_true", help="look once and end")
    arguments = parser.parse_args()
    program.start_log()
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    interval = arguments.interval if arguments.interval is not None else 2.0 if sys.stdout.isatty() else 60.0
    return program.run(lambda: watch(arguments.results, interval, arguments.once, sys.stdout))
