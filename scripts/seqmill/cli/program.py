"""Shared by all command-line programs: the log, errors in one line, exit codes, common options."""

import argparse
import errno
import logging
import math
import os
import signal
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from seqmill.base.extras import optional_packages
from seqmill.base.machine import allow_many_files
from seqmill.base.signals import Interrupted, Signals
from seqmill.errors import SeqmillError
from seqmill.spec.families import FAMILIES
from seqmill.spec.lengths import FAMILY_DEFAULT, LONG_SEQUENCES, STRANDS, LengthPolicy, choose_length_policy
from seqmill.spec.models import find_model
from seqmill.spec.outputs import POOLINGS, RESIDUE_DTYPES, Outputs
from seqmill.spec.task import ATTENTIONS, AUTO, DEVICES, ON_INVALID, PRECISIONS, ComputeSettings

# Besides Ctrl-C, which Python handles. A worker catches them itself, to write its status first.
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

log = logging.getLogger("seqmill")


def exit_code_of(work: Callable[[], int | None], kept: str = "") -> int:
    """Do the work of a program and return its exit code: its own, 0, 1 after an error, or 130 after Ctrl-C.

    A SeqmillError, a missing optional package, or an error of the operating system (disk full, no permission) is logged
    in one line; any other is a defect of seqmill and keeps its traceback. Any other signal that ends a process, as at a
    cluster's time limit, also lets the work clean up; the process then ends with 128 + the signal's number. The log
    goes to standard error, which a workflow redirects to the rule's log file. `kept` is added to the messages after a
    full disk or a signal.
    """
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    allow_many_files()  # a merge maps every shard, and there may be over 1024
    signals = Signals(ENDING_SIGNALS)
    try:
        signals.catch()
        with optional_packages():
            return work() or 0
    except SeqmillError as error:
        log.error("%s", error)
        return 1
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "; make room and run again" + (f": {kept}" if kept else "")
        log.error("%s%s", error, advice if is_full else "")
        return 1
    except KeyboardInterrupt:
        log.info("stopped by Ctrl-C")
        return 128 + signal.SIGINT
    except Interrupted as stop:
        signals.ignore()
        log.error("%s%s", stop, f"; {kept}" if kept else "")
        logging.shutdown()
        os._exit(stop.code)  # at once: threads may have minutes of work left
    finally:
        signals.restore()


def add_length_options(parser: argparse._ActionsContainer) -> None:
    """Add the options for long sequences and strands; see `length_policy_of`."""
    parser.add_argument(
        "--long-sequences",
        choices=(FAMILY_DEFAULT, *LONG_SEQUENCES),
        default=FAMILY_DEFAULT,
        help="sequences longer than max-length: truncate (embed the beginning), window (embed in windows), "
        "full (embed as a whole), reject (leave the record out); auto: truncate proteins, window nucleotides",
    )
    usual = ", ".join(f"{family.max_length} ({family.title})" for family in FAMILIES.values())
    for name, explanation in (
        ("--max-length", f"in residues or bases; auto: {usual}"),
        ("--window", "residues or bases in a window; auto: max-length"),
        ("--stride", "from one window to the next; auto: half a window of proteins, a window of nucleotides"),
    ):
        parser.add_argument(name, type=length, default=FAMILY_DEFAULT, help=explanation)
    parser.add_argument(
        "--strand",
        choices=STRANDS,
        default="forward",
        help="nucleotides: as given, or the mean of both strands (default: forward)",
    )


def add_invalid_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--on-invalid",
        choices=ON_INVALID,
        default="fail",
        help="if records have a letter that is not allowed, or no sequence: fail, or skip the records (default: fail)",
    )


def add_reuse_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--reuse",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE",
        help="earlier results (embeddings.h5): their vectors are reused for identical sequences",
    )


def length_policy_of(arguments: argparse.Namespace) -> LengthPolicy:
    """Return the policy that the options of `add_length_options` and `--model` ask for; refuse one out of range."""
    options = (getattr(arguments, field.name) for field in fields(LengthPolicy))
    return choose_length_policy(find_model(arguments.model).family, *options)


def add_compute_options(parser: argparse._ActionsContainer) -> None:
    """Add the options that choose how embeddings are computed; see `compute_settings_of`."""
    parser.add_argument("--device", choices=DEVICES, default=AUTO, help="auto: CUDA if there is a GPU, else the CPU")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=AUTO,
        help="of the matrix products; auto: bfloat16 if the device has it, else float32; ProtT5 and ProstT5 have "
        "neither float16 nor float8, ESM C has no float8",
    )
    parser.add_argument("--attention", choices=ATTENTIONS, default=AUTO, help="attention kernel; auto: the fastest")
    parser.add_argument(
        "--threads", type=at_least(0), default=0, help="CPU threads (default: 0, as many as torch chooses)"
    )
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=[-1],
        help="layers to read: 0 is the embedding of the tokens, k the output of block k, -1 the last (default: -1)",
    )
    parser.add_argument(
        "--pooling",
        choices=POOLINGS,
        nargs="+",
        default=["mean"],
        help="how each layer's token vectors become a sequence's vector: mean, as the model's authors compute it "
        "(default), mean_tokens (nucleotides: without CLS and SEP), max, std, cls (the first token's vector; ProtT5 "
        "and ProstT5 have none)",
    )
    parser.add_argument(
        "--per-residue",
        choices=RESIDUE_DTYPES,
        default="",
        help="proteins only: also keep the vector of every residue, in this type (default: do not)",
    )


def compute_settings_of(arguments: argparse.Namespace) -> ComputeSettings:
    """Return the settings that the options of `add_compute_options` ask for; refuse a layer that is named twice."""
    outputs = Outputs(tuple(arguments.layers), tuple(arguments.pooling), arguments.per_residue)
    return ComputeSettings(arguments.device, arguments.precision, arguments.attention, arguments.threads, outputs)


def add_output_options(parser: argparse._ActionsContainer) -> None:
    """Add the options that choose an output of an embeddings.h5, as in `seqmill.open_embeddings`."""
    parser.add_argument("--layer", type=int, help="layer, for a file with several outputs (default: the first)")
    parser.add_argument("--pooling", choices=POOLINGS, help="pooling (default: the first of that layer)")


def add_results_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results",
        type=Path,
        nargs="?",
        default=Path("results"),
        help="results, results/DATASET, results/DATASET/MODEL, or the folder with results/ (default: results)",
    )


def length(text: str) -> int | str:
    """Argparse type: auto, or a positive integer."""
    return text if text == FAMILY_DEFAULT else at_least(1)(text)


def at_least(minimum: int) -> Callable[[str], int]:
    """Return an argparse type: an integer not below `minimum`."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < minimum:
            raise ArgumentTypeError(f"{value} is below {minimum}")
        return value

    return integer


def seconds(text: str) -> float:
    """Argparse type: a number of seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return value
