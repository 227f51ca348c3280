"""Verify all shards of an index and merge them into one file in the order of the FASTA."""

import argparse
from pathlib import Path

EPILOG = """examples:
  seqmill merge --index index.h5 --shards shards/shard_0-of-2.h5 shards/shard_1-of-2.h5 --output embeddings.h5
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--index", type=Path, required=True, help="the index.h5 of the shards")
    parser.add_argument("--shards", type=Path, nargs="+", required=True, help="all shards, in any order")
    parser.add_argument(
        "--statuses",
        type=Path,
        nargs="+",
        help="their status JSONs, in the same order (default: SHARD.status.json for each SHARD.h5)",
    )
    parser.add_argument("--output", type=Path, required=True, help="the embeddings.h5 to write")
    parser.add_argument("--records", type=Path, help="table of fates (default: records.tsv.gz in the output's folder)")
    parser.add_argument("--manifest", type=Path, help="manifest (default: manifest.json in the output's folder)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of the embeddings (default: float32)"
    )
    parser.add_argument("--fasta", type=Path, help="refuse to merge if the index was built from another FASTA")


def work(arguments: argparse.Namespace) -> None:
    from seqmill.merge.merge import merge_shards
    from seqmill.store.layout import RunFolder, status_path_of

    folder = RunFolder(arguments.output.parent)
    merge_shards(
        arguments.index,
        arguments.shards,
        arguments.statuses or [status_path_of(shard) for shard in arguments.shards],
        arguments.output,
        arguments.records or folder.records,
        arguments.manifest or folder.manifest,
        arguments.dtype,
        arguments.fasta,
    )
