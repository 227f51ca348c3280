#!/usr/bin/env python3
"""Build the sequence index of a FASTA file: validated, deduplicated, tokenized, sorted, packed."""

import argparse
import os
import sys
from pathlib import Path

from seqpack import command
from seqpack.length_policy import AUTO, LONG_SEQUENCES, STRANDS, choose_length_policy


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fasta", type=Path, required=True, help="proteins or nucleotides; plain, gzip, bgzip or zstd")
    parser.add_argument(
        "--model",
        required=True,
        help="a name such as esm2_t33_650M_UR50D or dnabert_s, a fair-esm .pt file, a Hugging Face folder, "
        "or untrained:NAME for random weights",
    )
    parser.add_argument("--output", type=Path, required=True, help="the index to write (index.h5)")
    parser.add_argument(
        "--long-sequences",
        choices=(AUTO, *LONG_SEQUENCES),
        default=AUTO,
        help="what to do with sequences longer than max-length: truncate (embed the beginning), window (nucleotides: "
        "the mean of windows), full (there is no limit), reject (leave the record out); auto: truncate proteins, "
        "window nucleotides",
    )
    parser.add_argument(
        "--max-length", type=_auto_or_length, default=AUTO, help="in residues or bases; auto: 1022 or 10000"
    )
    parser.add_argument("--window", type=_auto_or_length, default=AUTO, help="bases in a window; auto: max-length")
    parser.add_argument(
        "--stride", type=_auto_or_length, default=AUTO, help="bases from a window to the next; auto: the window"
    )
    parser.add_argument(
        "--strand",
        choices=STRANDS,
        default="forward",
        help="of nucleotides: as given, or the mean of both strands (default: forward)",
    )
    parser.add_argument(
        "--threads",
        type=command.at_least(0),
        default=0,
        help="CPU threads for byte pairs (default: 0, all cores)",
    )
    return parser.parse_args()


def _auto_or_length(text: str) -> int | str:
    return text if text == AUTO else command.at_least(1)(text)


def main() -> int:
    command.start_log()
    arguments = parse_arguments()

    def work() -> None:
        from seqpack.index_build import build_index
        from seqpack.models.registry import find_model

        if arguments.threads:
            os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)  # of the tokenizers library
        policy = choose_length_policy(
            find_model(arguments.model).family,
            arguments.long_sequences,
            arguments.max_length,
            arguments.window,
            arguments.stride,
            arguments.strand,
        )
        build_index(arguments.fasta, arguments.output, arguments.model, policy)

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
