"""Embed one shard: the packs rank, rank + world size, rank + 2 x world size ... of an index."""

import argparse
from pathlib import Path

from seqmill.base.signals import stop_with_parent
from seqmill.cli import program
from seqmill.spec.task import ON_ERROR, ShardTask

KEPT = "finished packs are saved"
EPILOG = """examples:
  seqmill shard --index index.h5 --rank 0 --world-size 2 --output shard_0-of-2.h5 --status shard_0-of-2.status.json
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--index", type=Path, required=True, help="index.h5 of `seqmill index`; names the model")
    parser.add_argument(
        "--model", default="", help="as for `seqmill index` (default: the model for which the index was built)"
    )
    parser.add_argument("--rank", type=program.at_least(0), required=True, help="this shard's number, from 0")
    parser.add_argument("--world-size", type=program.at_least(1), required=True, help="number of shards")
    parser.add_argument("--output", type=Path, required=True, help="the shard to write (HDF5)")
    parser.add_argument("--status", type=Path, required=True, help="the status JSON to write")
    program.add_compute_options(parser.add_argument_group("computation"))
    care = parser.add_argument_group("failures and checks")
    care.add_argument(
        "--on-error",
        choices=ON_ERROR,
        default="fail",
        help="if a sequence has no finite embedding, not even in float32: fail, or skip the sequence",
    )
    care.add_argument(
        "--save-seconds",
        type=program.seconds,
        default=60.0,
        help="seconds between saves of finished packs, from which a later attempt resumes (default: 60)",
    )
    care.add_argument(
        "--audit-seconds",
        type=program.seconds,
        default=10.0,
        help="time limit in seconds of the audit, which recomputes a few sequences by a reference, or 1 %% of the "
        "computation if that is longer; 0 for no audit (default: 10)",
    )
    workflow = parser.add_argument_group("in a workflow")
    workflow.add_argument(
        "--parent", type=program.at_least(1), help="stop when this process ends, for example when a workflow is killed"
    )
    workflow.add_argument(
        "--attempt", type=program.at_least(1), default=1, help="number of the attempt, for the status JSON"
    )


def work(arguments: argparse.Namespace) -> None:
    if arguments.parent:
        stop_with_parent(arguments.parent)
    from seqmill.embedding.worker import embed_shard

    task = ShardTask(
        index=arguments.index,
        rank=arguments.rank,
        world_size=arguments.world_size,
        shard=arguments.output,
        status=arguments.status,
        settings=program.compute_settings_of(arguments),
        model=arguments.model,
        on_error=arguments.on_error,
        save_seconds=arguments.save_seconds,
        audit_seconds=arguments.audit_seconds,
        attempt=arguments.attempt,
    )
    embed_shard(task)
