"""Download a released model's weights: a broken download is resumed, digests and computed numbers are checked."""

import argparse
from pathlib import Path

from seqmill.spec.models import NAMES
from seqmill.spec.released import RELEASED


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "SEQMILL_WEIGHTS_URL names a mirror, which holds files NAME.pt of ESM-2 and folders NAME of DNABERT."
    )
    parser.add_argument("--model", required=True, choices=NAMES, help="name of the model")
    parser.add_argument("--output", type=Path, required=True, help="ESM-2's .pt file or DNABERT's folder to write")
    parser.add_argument(
        "--facts",
        type=Path,
        default=RELEASED,
        help="sources, digests and published numbers (default: scripts/seqmill/spec/released.json)",
    )


def work(arguments: argparse.Namespace) -> None:
    from seqmill.run.fetch import fetch_weights

    fetch_weights(arguments.model, arguments.output, arguments.facts)
