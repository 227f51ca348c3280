"""Fetch a model's weights, unless they are on this disk.

Released models are checked: the digests of their files, and numbers that they compute. A broken download is resumed.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from seqmill.spec.models import find_model, is_hub_id
from seqmill.spec.released import RELEASED

EPILOG = """examples:
  seqmill fetch esm2_t33_650M_UR50D
  seqmill fetch facebook/esm2_t6_8M_UR50D --output models/esm2_t6_8M_UR50D.pt
  seqmill fetch OWNER/NAME                       another model of these families on the Hugging Face Hub

environment:
  SEQMILL_MODELS       the user's folder of weights (default: ~/.cache/seqmill/models)
  SEQMILL_WEIGHTS_URL  a mirror with files NAME.pt of ESM-2 and folders NAME of other models
  HF_HOME, HF_ENDPOINT, HF_TOKEN ... of huggingface_hub, for OWNER/NAME
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("model", help="a name that `seqmill models` lists, or OWNER/NAME on the Hugging Face Hub")
    parser.add_argument(
        "--output",
        type=Path,
        help="ESM-2's .pt file, or another model's folder, to write (default: in the user's folder of weights)",
    )
    parser.add_argument(
        "--facts",
        type=Path,
        default=RELEASED,
        help="sources, digests, and published numbers (default: those that come with seqmill)",
    )


def work(arguments: argparse.Namespace) -> None:
    from seqmill.fetch.models import fetch_model
    from seqmill.fetch.weights import fetch_weights

    name, output = arguments.model, arguments.output
    if is_hub_id(name):
        if output:
            raise argparse.ArgumentTypeError(f"--output is for released models; the Hub's cache keeps {name}")
        print(f"{name}: give this folder as the model: {fetch_model(name).path}")
        return
    source = find_model(name)
    if source.kind != "released":
        print(f"{name}: nothing to fetch: {source.path or 'random weights need no files'}")
        return
    source = replace(source, path=output) if output else source
    was_there = source.is_on_disk
    if output:
        fetch_weights(source.name, output, arguments.facts)
    elif not was_there:
        source = fetch_model(name, arguments.facts)
    print(f"{source.name}: {'on this disk already' if was_there else 'fetched'}: {source.path}")
