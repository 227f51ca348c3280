"""`seqmill NAME ...`: each program of the workflow as a subcommand."""

from __future__ import annotations

import sys
from importlib import import_module

PROGRAMS = (
    "build_index",
    "cut_contigs",
    "doctor",
    "embed_shard",
    "export",
    "fetch_weights",
    "merge_shards",
    "plan",
    "report",
    "search",
    "watch",
)


def main() -> int:
    """Run the program that the first argument names; return its exit code."""
    if len(sys.argv) < 2 or sys.argv[1] not in PROGRAMS:
        sys.exit(f"usage: seqmill {{{','.join(PROGRAMS)}}} ...")
    name = sys.argv.pop(1)
    sys.argv[0] = f"seqmill {name}"
    return import_module(f"seqmill.cli.{name}").main()
