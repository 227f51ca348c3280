"""Embed one shard: the packs rank, rank + world size, rank + 2 x world size ... of an index."""

import argparse
from pathlib import Path

from seqmill.base.signals import stop_with_parent
from seqmill.cli import program
from seqmill.spec.outputs import POOLINGS, RESIDUE_DTYPES, Outputs
from seqmill.spec.task import ATTENTIONS, DEVICES, ON_ERROR, PRECISIONS, ShardTask


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--index", type=Path, required=True, help="index.h5 of build_index.py; names the model")
    parser.add_argument(
        "--model", default="", help="as for build_index.py (default: the model the index was built for)"
    )
    parser.add_argument("--rank", type=program.at_least(0), required=True, help="this shard's number, from 0")
    parser.add_argument("--world-size", type=program.at_least(1), required=True, help="number of shards")
    parser.add_argument("--output", type=Path, required=True, help="the shard to write (HDF5)")
    parser.add_argument("--status", type=Path, required=True, help="the status JSON to write")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto takes CUDA if there is any")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of the matrix products; auto takes bfloat16 where the device has it, else float32",
    )
    parser.add_argument(
        "--threads", type=program.at_least(0), default=0, help="CPU threads (default: 0, as many as torch chooses)"
    )
    parser.add_argument(
        "--attention", choices=ATTENTIONS, default="auto", help="the attention kernel; auto takes the fastest"
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
        help="from one vector a token to one a sequence, of each layer: mean, as the model's authors take it "
        "(default), mean_tokens (nucleotides: without CLS and SEP), max, std, cls (the first token's vector)",
    )
    parser.add_argument(
        "--per-residue",
        choices=RESIDUE_DTYPES,
        default="",
        help="of proteins, keep the vector of every residue as well, in this type (default: not)",
    )
    parser.add_argument(
        "--on-error",
        choices=ON_ERROR,
        default="fail",
        help="when a sequence has no finite embedding, in float32 either: fail, or leave the sequence out",
    )
    parser.add_argument(
        "--save-seconds",
        type=program.seconds,
        default=60.0,
        help="how often finished packs are saved, for a later attempt to go on from (default: 60)",
    )
    parser.add_argument(
        "--audit-seconds",
        type=program.seconds,
        default=10.0,
        help="how long recomputing a few sequences by a reference may take, or 1 %% of the time if that is longer; "
        "0 for no audit (default: 10)",
    )
    parser.add_argument(
        "--parent", type=program.at_least(1), help="stop when this process ends, as when a workflow is killed"
    )
    parser.add_argument("--attempt", type=program.at_least(1), default=1, help="recorded in the status JSON")
    return parser.parse_args()


def main() -> int:
    program.start_log()
    arguments = parse_arguments()

    if arguments.parent:
        stop_with_parent(arguments.parent)

    def work() -> None:
        from seqmill.embed.worker import embed_shard

        task = ShardTask(
            index=arguments.index,
            rank=arguments.rank,
            world_size=arguments.world_size,
            shard=arguments.output,
            status=arguments.status,
            model=arguments.model,
            device=arguments.device,
            precision=arguments.precision,
            attention=arguments.attention,
            threads=arguments.threads,
            outputs=Outputs(tuple(arguments.layers), tuple(arguments.pooling), arguments.per_residue),
            on_error=arguments.on_error,
            save_seconds=arguments.save_seconds,
            audit_seconds=arguments.audit_seconds,
            attempt=arguments.attempt,
        )
        embed_shard(task)

    return program.run(work, when_full="finished parts are kept", when_stopped="what was finished is saved")
