"""Run the whole workflow in any folder: index, shards, merge, report."""

import argparse
import logging
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable
from contextlib import chdir
from functools import partial
from pathlib import Path
from typing import NoReturn

from seqmill.base.commands import command
from seqmill.base.machine import visible_gpus
from seqmill.cli import program
from seqmill.errors import SeqmillError

EPILOG = """Snakemake gets what follows --, runs the workflow, and gives its exit code.

examples:
  seqmill run proteins.faa --model esm2_t33_650M_UR50D --output embeddings
  seqmill run proteins.faa --gpus 8 --profile slurm -- --dry-run
  seqmill run --write-profile my-cluster
  seqmill run proteins.faa -- plan
  seqmill run --config datasets=table.tsv exports=npy
"""
# Options and targets of Snakemake with which it computes nothing: weights need not be there, and no one repeats them.
COMPUTES_NOTHING = re.compile(
    r"-[a-zA-Z]*n[a-zA-Z]*|-[hvtlSD]|--help|--version|--dry-?run|--unlock|--lint|--list.*|--dag|--rulegraph|--filegraph"
    r"|--d3dag|--(detailed-)?summary|--touch|--report|--archive|--delete-.*|--cleanup-.*|--cm|plan"
)

log = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "fasta", nargs="?", help="FASTA file to embed; without it, config/config.yaml says what to embed"
    )
    parser.add_argument("--model", help="name of a model, or path of its weights (default: esm2_t33_650M_UR50D)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder for results/ and logs/ (default: the current one); it may hold settings in config/config.yaml",
    )
    parser.add_argument(
        "--gpus", type=program.at_least(1), metavar="N", help="use N GPUs: N shards at a time, one on each"
    )
    parser.add_argument("--cores", type=cores, metavar="N", help="CPU cores (default: all, or what --profile says)")
    parser.add_argument("--profile", help="slurm, or a folder with your own profile (default: this machine)")
    parser.add_argument(
        "--write-profile", type=Path, metavar="DIR", help="only write a SLURM profile, to edit, as DIR/profile.yaml"
    )
    parser.add_argument(
        "--config",
        type=setting,
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings, such as shards=4 or 'exports=[npy,parquet]'",
    )
    # argparse itself would lose a FASTA file, an option and then --, in this order.
    parser.parse_known_args = partial(_parse_known_args, parser)  # type: ignore[assignment]  # a method


def _parse_known_args(
    parser: argparse.ArgumentParser, args: Iterable[str] | None = None, namespace: argparse.Namespace | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Parse what comes before --, and keep the rest as `snakemake`, and all as `given`."""
    given = sys.argv[1:] if args is None else list(args)
    end = given.index("--") if "--" in given else len(given)
    parsed, unknown = argparse.ArgumentParser.parse_known_args(parser, given[:end], namespace)
    if unknown:
        advice = "options of Snakemake go after --, and several FASTA files into a table (--config datasets=TABLE)"
        parser.error(f"unrecognized arguments: {shlex.join(unknown)}; {advice}")
    parsed.given, parsed.snakemake = given, given[end + 1 :]
    return parsed, []


def setting(text: str) -> tuple[str, str]:
    """Argparse type: KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def cores(text: str) -> str:
    """Argparse type: all, or a positive integer."""
    return text if text == "all" else str(program.at_least(1)(text))


def work(arguments: argparse.Namespace) -> None:
    if arguments.write_profile:
        write_own_profile(arguments)
    else:
        start(arguments)


def write_own_profile(arguments: argparse.Namespace) -> None:
    """Write a profile, and say how to go on."""
    from seqmill.run.workflow_files import write_profile

    if len(arguments.given) > (1 if "=" in arguments.given[0] else 2):
        raise argparse.ArgumentTypeError("--write-profile only writes a profile: give it alone")
    folder = arguments.write_profile
    path = write_profile(folder)
    dry_run = command("run", "proteins.faa", "--profile", str(folder), "--", "--dry-run")
    print(f"{path}: edit the block at its top: partition, account, type of GPU.\nThen see what would run: {dry_run}")


def start(arguments: argparse.Namespace) -> NoReturn:
    """Become the Snakemake that runs the workflow."""
    from seqmill.run.launch import DEFAULT_PROFILE, Launch
    from seqmill.run.started import record_command

    profile = arguments.profile or DEFAULT_PROFILE
    number = arguments.cores or ("" if arguments.profile else "all")
    launch = Launch(settings_of(arguments), arguments.output, profile, number, arguments.gpus or 0, arguments.snakemake)
    started = launch.command()
    datasets = launch.datasets()
    launch.require_possible(datasets)
    require_writable(arguments.output)
    if not any(COMPUTES_NOTHING.fullmatch(option.partition("=")[0]) for option in arguments.snakemake):
        with chdir(arguments.output):
            fetch_missing({dataset.model.name for dataset in datasets})
        record_command(arguments.output, arguments.given, {dataset.folder.name for dataset in datasets})
    if arguments.gpus and not arguments.profile and not visible_gpus():
        log.warning("no GPU is visible here: the %d shards are computed on the CPU, one after another", arguments.gpus)
    log.info("%s", shlex.join(started))
    sys.stdout.flush()
    os.execv(started[0], started)


def settings_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the settings of all options; refuse one that is given twice."""
    options = (("fasta", arguments.fasta), ("model", arguments.model), ("shards", arguments.gpus))
    given = [(key, str(value), str(value)) for key, value in options if value is not None]
    given += [(key, value, f"--config {key}={value}") for key, value in arguments.config]
    settings: dict[str, tuple[str, str]] = {}
    for key, value, shown in given:
        if settings.setdefault(key, (value, shown))[0] != value:
            raise argparse.ArgumentTypeError(f"{key} is given twice: {settings[key][1]} and {shown}")
    return {key: value for key, (value, _) in settings.items()}


def require_writable(folder: Path) -> None:
    """Make a folder if there is none; raise a SeqmillError if it is not one in which files can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SeqmillError(
            f"{folder}: no files can be written there: {error.strerror}; give another --output"
        ) from error


def fetch_missing(names: Iterable[str]) -> None:
    """Fetch the files of models that are not on this disk, as a cluster's nodes may have no internet."""
    from seqmill.fetch.models import fetch_model

    for name in names:
        fetch_model(name)
