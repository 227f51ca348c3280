"""The checks before a merge: every shard present, whole, of one computation, nothing missing."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from seqmill.errors import SeqmillError
from seqmill.store.index import Index
from seqmill.store.shard_checks import VerifiedShard, verify_shard


def verify_shards(index: Index, shard_paths: list[Path], status_paths: list[Path]) -> list[VerifiedShard]:
    """Check a set of shards against the index; return them in the order of their ranks.

    Args:
        index: what the shards should be of.
        shard_paths, status_paths: one of each per rank, in the same order.

    Raises:
        SeqmillError: names every shard that fails a check, and why.
    """
    if len(status_paths) != len(shard_paths):
        raise SeqmillError(f"{len(shard_paths)} shards but {len(status_paths)} status JSONs were given")
    world_size = len(shard_paths)
    verified: dict[int, VerifiedShard] = {}
    problems = []
    threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    checks = [
        threads.submit(verify_shard, index, shard_path, status_path, world_size)
        for shard_path, status_path in zip(shard_paths, status_paths, strict=True)
    ]
    try:
        for shard_path, check in zip(shard_paths, checks, strict=True):
            try:
                found = check.result()
                if found.shard.rank in verified:
                    other = verified[found.shard.rank].shard.path
                    raise SeqmillError(f"{shard_path}: rank {found.shard.rank} is also in {other}")
                verified[found.shard.rank] = found
            except SeqmillError as error:
                problems.append(str(error))
    finally:  # what interrupts the wait, as Ctrl-C, leaves shards unread that were not begun
        threads.shutdown(wait=False, cancel_futures=True)
    if problems:
        raise SeqmillError(f"{len(problems)} of {world_size} shards can't be merged:\n  " + "\n  ".join(problems))
    shards = [verified[rank] for rank in range(world_size)]
    _verify_together(index, shards)
    return shards


def _verify_together(index: Index, shards: list[VerifiedShard]) -> None:
    first = shards[0].shard
    for other in (verified.shard for verified in shards[1:]):
        if difference := other.fingerprint.difference(first.fingerprint):
            raise SeqmillError(f"{other.path} and {first.path} are not of one computation: {difference}")
        if other.embeddings.shape[1] != first.embeddings.shape[1] or other.residues.shape[1] != first.residues.shape[1]:
            raise SeqmillError(
                f"{other.path}: embeddings have {other.embeddings.shape[1]} dimensions, "
                f"those of {first.path} {first.embeddings.shape[1]}"
            )
    # Said by the shards' own rows, not by the plan they were checked against.
    times = np.bincount(
        np.concatenate([rows for v in shards for rows in (v.shard.index_rows, v.shard.quarantined_rows)]),
        minlength=index.num_computed,
    )
    if len(times) != index.num_computed or (times != 1).any():
        wrong = int(np.flatnonzero(times != 1)[0])
        raise SeqmillError(f"sequence {index.sequence_id(wrong)!r} stands {times[wrong]} times in the shards, not once")
