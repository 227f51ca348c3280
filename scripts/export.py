#!/usr/bin/env python3
"""Write an embeddings file in the format of another program: Parquet, .npy, AnnData, FAISS, UniProt's, fair-esm's."""

import argparse
import sys
from pathlib import Path

from seqpack import command

FORMATS = (
    "parquet",
    "npy",
    "h5ad",
    "h5",
    "h5_residues",
    "faiss",
    "pt",
)  # seqpack.export.WRITERS, without what that imports


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--embeddings", type=Path, required=True, help="the embeddings.h5 to read")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="h5: a dataset a record, as UniProt publishes; h5_residues: of the vectors of its residues; "
        "pt: a file a record, as fair-esm writes",
    )
    parser.add_argument("--output", type=Path, required=True, help="the file to write; of pt the folder to make")
    parser.add_argument("--records", type=Path, help="pt: the records.tsv.gz, for labels with the whole header")
    return parser.parse_args()


def main() -> int:
    command.start_log()
    arguments = parse_arguments()

    def work() -> None:
        from seqpack.export import export_embeddings

        export_embeddings(arguments.embeddings, arguments.output, arguments.format, arguments.records)

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
