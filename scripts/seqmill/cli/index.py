"""Build the index of a FASTA file: validate, deduplicate, tokenize, sort and pack its sequences."""

import argparse
import os
from pathlib import Path

from seqmill.cli import program

EPILOG = """examples:
  seqmill index --fasta proteins.faa --model esm2_t33_650M_UR50D --output index.h5
  seqmill index --fasta proteins.faa --model prott5_xl_u50 --output index.h5
  seqmill index --fasta contigs.fna --model dnabert_s --strand both --output index.h5
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--fasta", type=Path, required=True, help="proteins or nucleotides; plain, gzip, bgzip or zstd")
    parser.add_argument(
        "--model",
        required=True,
        help="a name that `seqmill models` lists, a checkpoint (ESM-2's .pt, ESM C's .pth), a Hugging Face folder, "
        "or untrained:NAME for random weights",
    )
    parser.add_argument("--output", type=Path, required=True, help="the index to write (index.h5)")
    program.add_length_options(parser.add_argument_group("long sequences and strands"))
    program.add_invalid_option(parser)
    program.add_reuse_option(parser)
    parser.add_argument(
        "--threads",
        type=program.at_least(0),
        default=0,
        help="CPU threads of the nucleotide tokenizer (default: 0, all cores)",
    )


def work(arguments: argparse.Namespace) -> None:
    from seqmill.index.build import build_index

    if arguments.threads:
        os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)  # read by the tokenizers library
    policy = program.length_policy_of(arguments)
    build_index(arguments.fasta, arguments.output, arguments.model, policy, arguments.reuse, arguments.on_invalid)
