"""Forecast a run without embedding anything: counts, shards, time, disk and memory. Leaves no files."""

import argparse
from pathlib import Path

from seqmill.cli import program

EPILOG = """examples:
  seqmill plan --fasta proteins.faa --model esm2_t33_650M_UR50D --world-size 4
  seqmill plan --index results/proteins/esm2_t33_650M_UR50D/index.h5 --seconds 0
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--index", type=Path, help="index.h5 of `seqmill index`")
    source.add_argument("--fasta", type=Path, help="a FASTA file; its index is built in a temporary folder")
    parser.add_argument("--model", default="", help="as for `seqmill index` (default: that of the index)")
    as_built = parser.add_argument_group("with --fasta, as for `seqmill index`")
    program.add_length_options(as_built)
    program.add_invalid_option(as_built)
    program.add_reuse_option(as_built)
    as_built.add_argument(
        "--results",
        type=Path,
        help="existing folder for the results: the index is built there, and the free space of its disk is shown "
        "(default: TMPDIR, and the disk of the working directory)",
    )
    parser.add_argument("--world-size", type=program.at_least(1), default=1, help="number of shards (default: 1)")
    parser.add_argument(
        "--seconds", type=program.seconds, default=10.0, help="time to calibrate; 0 for no calibration (default: 10)"
    )
    program.add_compute_options(parser.add_argument_group("as for `seqmill shard`"))
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="as for `seqmill merge` (default: float32)"
    )


def work(arguments: argparse.Namespace) -> None:
    if arguments.fasta and not arguments.model:
        raise argparse.ArgumentTypeError("--fasta needs --model")
    if arguments.reuse and not arguments.fasta:
        raise argparse.ArgumentTypeError("--reuse needs --fasta: an index names the results that it reuses")
    if arguments.results and not arguments.fasta:
        raise argparse.ArgumentTypeError("--results needs --fasta: the results of an index are in its folder")
    from seqmill.run.plan import PlanOptions, plan_fasta, plan_index

    settings = program.compute_settings_of(arguments)
    options = PlanOptions(settings, arguments.world_size, arguments.dtype, arguments.seconds, arguments.on_invalid)
    if arguments.index:
        lines = plan_index(arguments.index, arguments.model, options)
    else:
        policy = program.length_policy_of(arguments)
        lines = plan_fasta(arguments.fasta, arguments.model, policy, arguments.reuse, arguments.results, options)
    print("\n".join(lines))
