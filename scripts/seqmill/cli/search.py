"""Find the nearest neighbors (cosine, exact) of one embeddings file's records in another."""

import argparse
from pathlib import Path

from seqmill.cli import program

EPILOG = """examples:
  seqmill search --query mine.h5 --target uniref50.h5 --k 5 --output neighbors.tsv
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--query", type=Path, required=True, help="the embeddings.h5 with the queries")
    parser.add_argument("--target", type=Path, required=True, help="the embeddings.h5 to search")
    parser.add_argument("--k", type=program.at_least(1), default=10, help="neighbors of each record (default: 10)")
    parser.add_argument("--output", type=Path, required=True, help="the tab-separated table to write")
    program.add_output_options(parser)


def work(arguments: argparse.Namespace) -> None:
    from seqmill.neighbors import write_neighbors

    options = (arguments.k, arguments.layer, arguments.pooling)
    write_neighbors(arguments.query, arguments.target, arguments.output, *options)
