"""What a run will take, told before it begins: the work of every shard, and disk."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from seqmill.base.words import size_in_words
from seqmill.merge.records import write_records
from seqmill.model.weights import open_weights
from seqmill.spec.models import AnyArchitecture, ModelSource, model_flop
from seqmill.spec.outputs import Outputs
from seqmill.store.index import Index
from seqmill.store.index_format import Fate

SAMPLED_RECORDS = 20_000  # of the table of records, whose compression is tried
# What HDF5 takes for a text of variable length besides its bytes: a reference, and an object in a heap, padded to 8.
TEXT_BYTES = 16 + 16
ROW_BYTES = 4 + 16  # a record's length and digest in embeddings.h5
SHARD_BYTES, MERGED_BYTES = 6000, 7500  # attributes and HDF5's own, about


@dataclass(frozen=True)
class Shares:
    """The work of each shard.

    Attributes:
        packs, tokens: int64 (world_size,).
        flop: float64 (world_size,), see `seqmill.spec.models.model_flop`.
        longest_flop: float64 (world_size,), of the longest segment alone.
    """

    packs: np.ndarray
    tokens: np.ndarray
    flop: np.ndarray
    longest_flop: np.ndarray

    @property
    def balance(self) -> float:
        """Tokens of the largest shard over their mean; 1 is even, as nothing at all is."""
        return float(self.tokens.max() / self.tokens.mean()) if self.tokens.any() else 1.0


@dataclass(frozen=True)
class Disk:
    """Bytes of each kind of file; `parts` are gone when a shard is complete, or the merge is done."""

    index: int
    parts: int
    shards: int
    merged: int

    @property
    def most(self) -> int:
        """Bytes that lie there at one time: at first parts and shards, later shards and what they are merged to."""
        return self.index + self.shards + max(self.parts, self.merged)


def share_work(index: Index, world_size: int, architecture: AnyArchitecture) -> Shares:
    """Count the work of each shard."""
    tokens = np.diff(index.token_offsets[index.pack_offsets])
    flop, longest = np.empty(index.num_packs), np.empty(index.num_packs)
    for pack in range(index.num_packs):
        lengths = index.pack_lengths(pack)
        flop[pack] = model_flop(architecture, lengths)
        longest[pack] = model_flop(architecture, lengths.max(keepdims=True))
    ranks = [slice(rank, None, world_size) for rank in range(world_size)]
    return Shares(
        packs=np.array([len(tokens[packs]) for packs in ranks]),
        tokens=np.array([tokens[packs].sum() for packs in ranks]),
        flop=np.array([flop[packs].sum() for packs in ranks]),
        longest_flop=np.array([longest[packs].max(initial=0) for packs in ranks]),
    )


def disk_needed(
    index: Index, world_size: int, hidden_dim: int, outputs: Outputs | None = None, dtype: str = "float32"
) -> Disk:
    """Estimate the bytes of all files of a run, from the index and a trial of the table of records.

    Args:
        index: whole.
        world_size: number of shards.
        hidden_dim: of the model.
        outputs: what is read of it; by default one vector a sequence.
        dtype: of the embeddings in the merged file, float32 or float16.
    """
    outputs = outputs or Outputs()
    text_bytes = -(-np.diff(index.record_id_offsets) // 8) * 8 + TEXT_BYTES  # of each record's id
    kept = index.record_fates != Fate.REJECTED
    num_kept, num_rows = int(np.count_nonzero(kept)), index.num_computed
    computed_ids = index.sequence_records[:num_rows]
    numbers = len(outputs.pairs) * hidden_dim
    vectors = num_rows * (4 * numbers + 8)
    residues = offsets = merged_offsets = 0
    if outputs.per_residue:  # kept once for each unique sequence, in the merged file as well
        a_residue = np.dtype(outputs.per_residue).itemsize * len(outputs.layers) * hidden_dim
        residues = int(index.attributes["num_residues"]) * a_residue
        offsets, merged_offsets = 8 * num_rows, 12 * num_kept
    merged = num_kept * (np.dtype(dtype).itemsize * numbers + ROW_BYTES) + int(text_bytes[kept].sum())
    return Disk(
        index=index.path.stat().st_size,
        parts=vectors + residues + index.num_packs * 64,
        shards=vectors + residues + offsets + int(text_bytes[computed_ids].sum()) + world_size * SHARD_BYTES,
        merged=merged + residues + merged_offsets + MERGED_BYTES + _table(index),
    )


def _table(index: Index) -> int:
    """Return the bytes of records.tsv.gz, judged by a block of records from the middle."""
    number = min(index.num_records, SAMPLED_RECORDS)
    first = (index.num_records - number) // 2
    block = slice(first, first + number)
    sample = replace(
        index,
        record_id_offsets=index.record_id_offsets[first : first + number + 1],
        record_description_offsets=index.record_description_offsets[first : first + number + 1],
        record_lengths=index.record_lengths[block],
        record_fates=index.record_fates[block],
        record_rows=index.record_rows[block],
    )
    with tempfile.NamedTemporaryFile() as file:
        write_records(Path(file.name), sample)
        return round(Path(file.name).stat().st_size * index.num_records / number)


def architecture_of(source: ModelSource) -> AnyArchitecture:
    """Return a model's shape, from its file if the name does not tell.

    Raises:
        SeqmillError: the weights can't be read.
    """
    return source.architecture or open_weights(source)[0]


def describe_index(index: Index, model: str) -> list[str]:
    """Return what is in the index, and the model that it will be embedded by, in lines."""
    attributes = index.attributes
    fates = {fate: number for fate, number in json.loads(attributes["fate_counts"]).items() if number}
    most = int(attributes["pack_tokens"])
    to_compute = f"{attributes['num_tokens']:,} tokens"
    if index.reuse:
        to_compute = f"{index.num_computed:,} of them to compute, {to_compute}"
    longest = f"{int(index.token_offsets[1]):,} tokens: {index.sequence_name(0)}"
    return [
        line("fasta", str(attributes["source_path"])),
        line("model", model),
        line("records", f"{index.num_records:,}: " + ", ".join(f"{number:,} {fate}" for fate, number in fates.items())),
        line("unique", f"{index.num_sequences:,} sequences, {to_compute}"),
        *(line("reused", f"{number:,} sequences from {path}") for path, number in index.reused_counts()),
        *([line("longest", longest)] * bool(index.num_computed)),
        line("packs", f"{index.num_packs:,}, of at most {most:,} tokens or one sequence"),
    ]


def describe_shares(shares: Shares) -> list[str]:
    """Return how even the shards are, in lines."""
    packs, tokens = _span(shares.packs), _span(shares.tokens)
    idle = int(np.count_nonzero(shares.packs == 0))
    lines = [
        line("shards", f"{len(shares.packs):,}: {packs} packs and {tokens} tokens in each"),
        line("balance", f"{shares.balance:.2f}, the most tokens of a shard over their mean"),
    ]
    if idle and len(shares.packs) > 1:
        lines.append(line("", f"{idle:,} shards have no work: take fewer"))
    return lines


def describe_disk(disk: Disk, folder: Path) -> list[str]:
    """Return what the files take and what is free on the disk of a folder, in lines."""
    free = shutil.disk_usage(folder).free
    kinds = ", ".join(f"{kind} {size_in_words(size)}" for kind, size in vars(disk).items())
    lines = [
        line("disk", f"{size_in_words(disk.most)} at one time: {kinds}"),
        line("", f"{size_in_words(free)} free on the disk of {folder}"),
    ]
    return lines + [line("", "THE DISK HAS NO ROOM FOR IT")] * (disk.most > free)


def _span(values: np.ndarray) -> str:
    least, most = int(values.min()), int(values.max())
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def line(label: str, text: str) -> str:
    return f"{label:<12}{text}"
