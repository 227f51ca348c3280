#!/usr/bin/env python3
"""Build the sequence index of a FASTA file: validated, deduplicated, tokenized, sorted, packed."""

import argparse
import sys
from pathlib import Path

from seqpack import command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fasta", type=Path, required=True, help="proteins; plain, gzip, bgzip or zstd")
    parser.add_argument(
        "--model",
        required=True,
        help="ESM-2 name such as esm2_t33_650M_UR50D, a fair-esm .pt file, a Hugging Face folder, "
        "or untrained:NAME for random weights",
    )
    parser.add_argument("--output", type=Path, required=True, help="the index to write (index.h5)")
    parser.add_argument(
        "--max-length", type=command.at_least(1), default=1022, help="longest sequence, in residues (default: 1022)"
    )
    parser.add_argument(
        "--long-sequences",
        choices=("truncate", "reject"),
        default="truncate",
        help="what to do with longer ones: embed the first max-length residues, or leave the record out "
        "(default: truncate)",
    )
    return parser.parse_args()


def main() -> int:
    command.start_log()
    arguments = parse_arguments()

    def work() -> None:
        from seqpack.index_build import LengthPolicy, build_index
        from seqpack.models.registry import find_protein_model

        model = find_protein_model(arguments.model)
        policy = LengthPolicy(arguments.long_sequences, arguments.max_length)
        build_index(arguments.fasta, arguments.output, model.name, policy)

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
