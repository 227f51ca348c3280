#!/usr/bin/env python3
"""Embed one shard: the packs rank, rank + world size, rank + 2 x world size ... of an index."""

import argparse
import sys
from pathlib import Path

from seqpack import command
from seqpack.devices import DEVICES, PRECISIONS


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--index", type=Path, required=True, help="index.h5 of build_index.py; names the model")
    parser.add_argument(
        "--model", default="", help="as for build_index.py (default: the model the index was built for)"
    )
    parser.add_argument("--rank", type=command.at_least(0), required=True, help="this shard's number, from 0")
    parser.add_argument("--world-size", type=command.at_least(1), required=True, help="number of shards")
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
        "--threads", type=command.at_least(0), default=0, help="CPU threads (default: 0, as many as torch chooses)"
    )
    parser.add_argument("--attempt", type=command.at_least(1), default=1, help="recorded in the status JSON")
    return parser.parse_args()


def main() -> int:
    command.start_log()
    arguments = parse_arguments()

    def work() -> None:
        from seqpack.worker import ShardTask, embed_shard

        embed_shard(
            ShardTask(
                index=arguments.index,
                rank=arguments.rank,
                world_size=arguments.world_size,
                shard=arguments.output,
                status=arguments.status,
                model=arguments.model,
                device=arguments.device,
                precision=arguments.precision,
                threads=arguments.threads,
                attempt=arguments.attempt,
            )
        )

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
