"""The checks before a merge: all shards are present, sound and of one computation, and every sequence is in one."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from seqmill.base.machine import usable_cores
from seqmill.errors import SeqmillError
from seqmill.merge.records import has_row
from seqmill.merge.reused import ReusedVectors
from seqmill.spec.fingerprint import Fingerprint
from seqmill.spec.outputs import Outputs, dataset_name, residue_dataset
from seqmill.store.index import Index
from seqmill.store.index_format import Fate
from seqmill.store.shard_checks import verify_shard
from seqmill.store.shards import Shard
from seqmill.store.status import ShardStatus


@dataclass(frozen=True)
class VerifiedSet:
    """All shards of one computation and the vectors it takes from earlier results; every check has passed."""

    index: Index
    shards: list[Shard]  # one per rank, in the order of the ranks
    statuses: list[ShardStatus]  # one per rank, in the order of the ranks
    reused: ReusedVectors

    @property
    def fingerprint(self) -> Fingerprint:
        return self.shards[0].fingerprint

    @property
    def warning(self) -> str:
        return self.statuses[0].warning

    @cached_property
    def outputs(self) -> dict[str, tuple[int, str]]:
        """Layer and pooling of each output by its dataset in embeddings.h5, in order."""
        layers = tuple(map(int, self.fingerprint.layers.split(",")))
        pairs = Outputs(layers, tuple(self.fingerprint.pooling.split(","))).pairs
        return {dataset_name(*pair, is_first=pair == pairs[0]): pair for pair in pairs}

    @property
    def residue_datasets(self) -> list[str]:
        """The dataset of each layer's residue vectors in embeddings.h5, in order."""
        layers = dict.fromkeys(layer for layer, _ in self.outputs.values())
        return [residue_dataset(layer, number == 0) for number, layer in enumerate(layers)]

    @property
    def width(self) -> int:
        """Numbers in a row of a shard: those of all outputs."""
        return self.shards[0].embeddings.shape[1]

    @property
    def hidden_dim(self) -> int:
        return self.width // len(self.outputs)

    @cached_property
    def fates(self) -> np.ndarray:
        """The final fate of every record (uint8)."""
        fates = np.array(self.index.record_fates)
        quarantined = np.concatenate([shard.quarantined_rows for shard in self.shards])
        fates[np.isin(self.index.record_rows, quarantined)] = Fate.QUARANTINED
        return fates

    @cached_property
    def kept(self) -> np.ndarray:
        """The records that have a row in embeddings.h5 (int64)."""
        return np.flatnonzero(has_row(self.fates))

    @cached_property
    def fate_counts(self) -> dict[str, int]:
        return {fate.name.lower(): int(np.count_nonzero(self.fates == fate)) for fate in Fate}

    @property
    def computed_by(self) -> list[str]:
        """The kinds of device and kernels that computed the vectors, sorted."""
        return sorted(self.reused.computed_by.union(*(shard.computed_by for shard in self.shards)))

    @property
    def audit(self) -> dict[str, Any]:
        """The worst errors in the audits of the shards and of earlier results, as file attributes."""
        found = [shard.audit for shard, status in zip(self.shards, self.statuses, strict=True) if status.num_sequences]
        found += [source.attributes for source in self.reused.used]
        audits = [audit for audit in found if audit["audit_sequences"]]
        references = sorted({text for audit in found for text in audit["audit_reference"].split("; ")})
        worst = {"audit_worst_cosine": min, "audit_worst_relative_error": max} if audits else {}
        return {
            "audit_sequences": sum(audit["audit_sequences"] for audit in audits),
            "audit_reference": "; ".join(references),
            **{name: choose(audit[name] for audit in audits) for name, choose in worst.items()},
        }

    def locate(self) -> tuple[np.ndarray, np.ndarray]:
        """Return for each index row the number of its shard (int32, -1 if none) and its row in there (int64)."""
        shard_of_row = np.full(self.index.num_sequences, -1, np.int32)
        place_of_row = np.zeros(self.index.num_sequences, np.int64)
        for number, shard in enumerate(self.shards):
            shard_of_row[shard.index_rows] = number
            place_of_row[shard.index_rows] = np.arange(len(shard.index_rows))
        return shard_of_row, place_of_row


def verify_shards(
    index: Index, shard_paths: list[Path], status_paths: list[Path], dtype: str = "float32"
) -> VerifiedSet:
    """Check a set of shards against the index, and the earlier results that the index reuses.

    Args:
        index: the index of the shards.
        shard_paths, status_paths: one of each per rank, in the same order.
        dtype: of the merged embeddings.

    Raises:
        SeqmillError: names every shard that fails a check and why, names a reused file that has changed, or says that
            no record has an embedding.
    """
    if len(status_paths) != len(shard_paths):
        raise SeqmillError(f"{len(shard_paths)} shards but {len(status_paths)} status JSONs were given")
    world_size = len(shard_paths)
    by_rank: dict[int, tuple[Shard, ShardStatus]] = {}
    problems = []
    threads = ThreadPoolExecutor(usable_cores())
    paths = zip(shard_paths, status_paths, strict=True)
    checks = [threads.submit(verify_shard, index, *pair, world_size) for pair in paths]
    try:
        for path, check in zip(shard_paths, checks, strict=True):
            try:
                shard, status = check.result()
                other, _ = by_rank.setdefault(shard.rank, (shard, status))
                if other is not shard:
                    raise SeqmillError(f"{path}: rank {shard.rank} is also in {other.path}")
            except SeqmillError as error:
                problems.append(str(error))
    finally:  # after an interrupt such as Ctrl-C, do not read the shards that are still queued
        threads.shutdown(wait=False, cancel_futures=True)
    if problems:
        raise SeqmillError(f"{len(problems)} of {world_size} shards can't be merged:\n  " + "\n  ".join(problems))
    shards, statuses = map(list, zip(*(by_rank[rank] for rank in range(world_size)), strict=True))
    _verify_together(index, shards)
    found = VerifiedSet(index, shards, statuses, ReusedVectors(index, shards[0].fingerprint, dtype))
    if not len(found.kept):
        raise SeqmillError(
            f"{index.path}: none of its {index.num_records} records has a finite embedding, so there is nothing to "
            "write; check the weights, or compute in precision float32"
        )
    return found


def _verify_together(index: Index, shards: list[Shard]) -> None:
    first = shards[0]
    for other in shards[1:]:
        if difference := other.fingerprint.difference(first.fingerprint):
            raise SeqmillError(f"{other.path} and {first.path} are not of one computation: {difference}")
        if other.embeddings.shape[1] != first.embeddings.shape[1] or other.residues.shape[1] != first.residues.shape[1]:
            raise SeqmillError(
                f"{other.path}: embeddings have {other.embeddings.shape[1]} dimensions, "
                f"those of {first.path} {first.embeddings.shape[1]}"
            )
    # Counted in the shards' own rows, not in the plan that they were checked against.
    rows = np.concatenate([rows for shard in shards for rows in (shard.index_rows, shard.quarantined_rows)])
    times = np.bincount(rows, minlength=index.num_computed)
    if len(times) != index.num_computed or (times != 1).any():
        wrong = int(np.flatnonzero(times != 1)[0])
        raise SeqmillError(f"sequence {index.sequence_id(wrong)!r} occurs {times[wrong]} times in the shards, not once")
