"""Write an embeddings file in another format: Parquet, .npy, CSV, TSV, AnnData, FAISS, UniProt's, fair-esm's."""

import argparse
from pathlib import Path

from seqmill.cli import program
from seqmill.export.formats import FORMATS

EPILOG = """examples:
  seqmill export --embeddings embeddings.h5 --format parquet --output embeddings.parquet
  seqmill export --embeddings embeddings.h5 --layer 12 --pooling max --format npy --output layer_12.npy
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--embeddings", type=Path, required=True, help="the embeddings.h5 to read")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="h5: a dataset per record, as UniProt publishes; h5_residues: the same for the vectors of residues; "
        "pt: a file per record, as fair-esm writes",
    )
    parser.add_argument("--output", type=Path, required=True, help="the file to write; for pt the folder to make")
    parser.add_argument("--records", type=Path, help="for pt: the records.tsv.gz, for labels with the whole header")
    program.add_output_options(parser.add_argument_group("of a file with several outputs"))


def work(arguments: argparse.Namespace) -> None:
    from seqmill.export.export import export_embeddings

    source, output_options = arguments.embeddings, (arguments.layer, arguments.pooling)
    export_embeddings(source, arguments.output, arguments.format, arguments.records, *output_options)
