"""Say what embedding will take, without embedding: counts, shards, time, disk, memory; write nothing that stays."""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from seqmill.base.words import time_in_words
from seqmill.cli import program
from seqmill.embed.lease import leased_gpu
from seqmill.errors import SeqmillError
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import ModelSource, find_model
from seqmill.spec.outputs import Outputs


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--index", type=Path, help="index.h5 of build_index.py")
    source.add_argument("--fasta", type=Path, help="a FASTA file; its index is built in a temporary folder")
    parser.add_argument("--model", default="", help="as for build_index.py (default: that of the index)")
    as_built = parser.add_argument_group("with --fasta, as for build_index.py")
    program.add_length_options(as_built)
    program.add_reuse_option(as_built)
    as_built.add_argument(
        "--results",
        type=Path,
        help="an existing folder, where results will lie: the temporary folder is made in it, and its disk is judged "
        "(default: TMPDIR; the disk of the working directory)",
    )
    parser.add_argument("--world-size", type=program.at_least(1), default=1, help="number of shards (default: 1)")
    parser.add_argument(
        "--seconds", type=program.seconds, default=10.0, help="of computing, to know the time; 0 for none (default: 10)"
    )
    program.add_compute_options(parser.add_argument_group("as for embed_shard.py"))
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="as for merge_shards.py (default: float32)"
    )
    arguments = parser.parse_args()
    if arguments.fasta and not arguments.model:
        parser.error("--fasta needs --model")
    if arguments.reuse and not arguments.fasta:
        parser.error("--reuse goes with --fasta: an index knows what it reuses")
    if arguments.results and not arguments.fasta:
        parser.error("--results goes with --fasta: those of an index lie beside it")
    return arguments


def plan(arguments: argparse.Namespace) -> None:
    from seqmill.embed.job import model_of
    from seqmill.index.build import build_index
    from seqmill.store.index import open_index

    settings = program.compute_settings_of(arguments)
    outputs = settings.outputs
    with ExitStack() as stack:
        if arguments.index:
            index = open_index(arguments.index)
            source = model_of(index, arguments.model)
            policy = LengthPolicy(**{name: index.attributes[name] for name in LengthPolicy.__dataclass_fields__})
            require_possible(arguments, source, policy, outputs, [Path(note["path"]) for note in index.reuse])
            about_index, folder = str(arguments.index), arguments.index.absolute().parent
        else:
            source, policy = find_model(arguments.model), program.length_policy_of(arguments)
            require_possible(arguments, source, policy, outputs, arguments.reuse)
            made = tempfile.TemporaryDirectory(prefix="seqmill-plan-", dir=arguments.results)
            temporary = Path(stack.enter_context(made))
            remove_when_stopped(temporary)
            if arguments.threads:
                os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)  # of the tokenizers library
            began = time.perf_counter()
            build_index(arguments.fasta, temporary / "index.h5", arguments.model, policy, arguments.reuse)
            took = time_in_words(time.perf_counter() - began)
            index = open_index(temporary / "index.h5")
            about_index = f"built in {took} for this plan alone; a run that has none yet builds its own"
            folder = (arguments.results or Path()).absolute()
        if arguments.seconds and arguments.device != "cpu":
            stack.enter_context(leased_gpu())  # as a worker does: other work on it would make it slow

        # Only now: what imports torch takes longer than to find a mistake.
        from seqmill.run.calibration import calibrate, describe_calibration
        from seqmill.run.forecast import (
            architecture_of,
            describe_disk,
            describe_index,
            describe_shares,
            disk_needed,
            line,
            share_work,
        )

        architecture = architecture_of(source)
        outputs = outputs.of(architecture.num_layers)
        shares = share_work(index, arguments.world_size, architecture)
        lines = [*describe_index(index, source.name), *describe_shares(shares)]
        lines.insert(2, line("index", about_index))
        if arguments.seconds and index.num_computed:
            lines += describe_calibration(calibrate(index, source, settings, arguments.seconds), shares)
        disk = disk_needed(index, arguments.world_size, architecture.hidden_dim, outputs, arguments.dtype)
        lines += describe_disk(disk, folder)
    sys.stdout.reconfigure(errors="backslashreplace")
    print("\n".join(lines))


def require_possible(
    arguments: argparse.Namespace, source: ModelSource, policy: LengthPolicy, outputs: Outputs, reused: list[Path]
) -> None:
    """Raise a SeqmillError if a run with these settings would be refused, as far as that is known before it begins."""
    from seqmill.run.reuse import known_settings, require_settings
    from seqmill.store.reuse import open_source

    outputs.require_family(source.family)
    known = known_settings(source, policy, outputs, arguments.precision)
    for path in reused:
        if not path.exists():
            raise SeqmillError(
                f"{path}: no such file, and its vectors are to be reused; bring it back, or take it out of reuse"
            )
        require_settings(open_source(path), source, known, arguments.dtype)


def remove_when_stopped(folder: Path) -> None:
    """Let a signal that ends this program remove the folder first; at once, not when threads are done with a pack."""

    def stop(number: int, frame: object) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(128 + number)

    for number in (signal.SIGINT, *program.ENDING_SIGNALS):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, which is to be obeyed
            signal.signal(number, stop)


def main() -> int:
    program.start_log()
    arguments = parse_arguments()
    return program.run(lambda: plan(arguments))
