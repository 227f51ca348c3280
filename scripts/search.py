#!/usr/bin/env python3
"""Find the nearest neighbors (cosine, exact) of one embeddings file's records among those of another."""

import argparse
import sys
from pathlib import Path

from seqpack import command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--query", type=Path, required=True, help="the embeddings.h5 whose records are looked for")
    parser.add_argument("--target", type=Path, required=True, help="the embeddings.h5 that is searched")
    parser.add_argument("--k", type=command.at_least(1), default=10, help="neighbors of each record (default: 10)")
    parser.add_argument("--output", type=Path, required=True, help="the tab-separated table to write")
    command.add_output_options(parser)
    return parser.parse_args()


def main() -> int:
    command.start_log()
    arguments = parse_arguments()

    def work() -> None:
        from seqpack.neighbors import write_neighbors

        settings = (arguments.k, arguments.layer, arguments.pooling)
        write_neighbors(arguments.query, arguments.target, arguments.output, *settings)

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
