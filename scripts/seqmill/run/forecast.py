"""Forecasts what a run needs: the work of each shard, and disk space."""

import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from seqmill.base.words import size_in_words
from seqmill.merge.records import write_records
from seqmill.spec.architectures import Architecture, model_flop
from seqmill.spec.outputs import Outputs
from seqmill.store.index import Index
from seqmill.store.index_format import Fate

SAMPLED_RECORDS = 20_000  # compressed to estimate the table of records
# HDF5's bytes for a text of variable length, without its letters: a reference, and a heap object padded to 8.
TEXT_BYTES = 16 + 16
ROW_BYTES = 4 + 16  # a record's length and digest in embeddings.h5
SHARD_BYTES, MERGED_BYTES = 6000, 7500  # attributes and HDF5's own, about


@dataclass(frozen=True)
class Shares:
    """The work of each shard; all arrays are (world_size,)."""

    packs: np.ndarray  # int64
    tokens: np.ndarray  # int64
    flop: np.ndarray  # float64, see `seqmill.spec.models.model_flop`
    longest_flop: np.ndarray  # float64, of the longest segment alone

    @property
    def balance(self) -> float:
        """Tokens of the largest shard over their mean; 1 if even, or without tokens."""
        return float(self.tokens.max() / self.tokens.mean()) if self.tokens.any() else 1.0


@dataclass(frozen=True)
class Disk:
    """Bytes of each kind of file; `parts` are removed when their shard is complete."""

    index: int
    parts: int
    shards: int
    merged: int

    @property
    def most(self) -> int:
        """The most bytes at one time: shards with their parts at first, shards with the merged files later."""
        return self.index + self.shards + max(self.parts, self.merged)


def share_work(index: Index, world_size: int, architecture: Architecture) -> Shares:
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
    """Estimate the bytes of all files of a run; `outputs` are one vector per sequence by default.

    `dtype` is that of the merged embeddings, float32 or float16.
    """
    outputs = outputs or Outputs()
    text_bytes = -(-np.diff(index.record_id_offsets) // 8) * 8 + TEXT_BYTES  # of each record's id
    kept = index.record_fates != Fate.REJECTED
    num_kept, num_rows = int(np.count_nonzero(kept)), index.num_computed
    computed_ids = index.sequence_records[:num_rows]
    numbers = len(outputs.pairs) * hidden_dim
    vectors = num_rows * (4 * numbers + 8)
    residues = offsets = merged_offsets = 0
    if outputs.per_residue:  # stored once per unique sequence, also in the merged file
        a_residue = np.dtype(outputs.per_residue).itemsize * len(outputs.layers) * hidden_dim
        residues = int(index.attributes["num_residues"]) * a_residue
        offsets, merged_offsets = 8 * num_rows, 12 * num_kept
    merged = num_kept * (np.dtype(dtype).itemsize * numbers + ROW_BYTES) + int(text_bytes[kept].sum())
    return Disk(
        index=index.path.stat().st_size,
        parts=vectors + residues + index.num_packs * 64,
        shards=vectors + residues + offsets + int(text_bytes[computed_ids].sum()) + world_size * SHARD_BYTES,
        merged=merged + residues + merged_offsets + MERGED_BYTES + _table_bytes(index),
    )


def _table_bytes(index: Index) -> int:
    """Estimate the bytes of records.tsv.gz by those of a block of records from the middle."""
    number = min(index.num_records, SAMPLED_RECORDS)
    first = (index.num_records - number) // 2
    block, edges = slice(first, first + number), slice(first, first + number + 1)
    sample = replace(
        index,
        record_id_offsets=index.record_id_offsets[edges],
        record_description_offsets=index.record_description_offsets[edges],
        record_lengths=index.record_lengths[block],
        record_fates=index.record_fates[block],
        record_rows=index.record_rows[block],
    )
    with tempfile.NamedTemporaryFile() as file:
        write_records(Path(file.name), sample)
        return round(Path(file.name).stat().st_size * index.num_records / number)


def describe_index(index: Index, model: str, origin: str) -> list[str]:
    """Describe an index and the model that will embed it, in lines; `origin` is where the index comes from."""
    attributes = index.attributes
    fates = {fate: number for fate, number in json.loads(attributes["fate_counts"]).items() if number}
    to_compute = f"{attributes['num_tokens']:,} tokens"
    if index.reuse:
        to_compute = f"{index.num_computed:,} of them to compute, {to_compute}"
    longest = f"{int(index.token_offsets[1]):,} tokens: {index.sequence_name(0)}" if index.num_computed else ""
    most = int(attributes["pack_tokens"])
    return [
        line("fasta", str(attributes["source_path"])),
        line("model", model),
        line("index", origin),
        line("records", f"{index.num_records:,}: " + ", ".join(f"{number:,} {fate}" for fate, number in fates.items())),
        line("unique", f"{index.num_sequences:,} sequences, {to_compute}"),
        *(line("reused", f"{number:,} sequences from {path}") for path, number in index.reused_counts()),
        *([line("longest", longest)] if longest else []),
        line("packs", f"{index.num_packs:,}, of at most {most:,} tokens or one sequence"),
    ]


def describe_shares(shares: Shares) -> list[str]:
    """Describe how even the shards are, in lines."""
    number, idle = len(shares.packs), int(np.count_nonzero(shares.packs == 0))
    return [
        line("shards", f"{number:,}: {_span(shares.packs)} packs and {_span(shares.tokens)} tokens in each"),
        line("balance", f"{shares.balance:.2f}, the most tokens of a shard over their mean"),
        *([line("", f"{idle:,} shards have no work: take fewer")] if idle and number > 1 else []),
    ]


def describe_disk(disk: Disk, folder: Path) -> list[str]:
    """Describe the disk space that the files need and that a folder's disk has free, in lines."""
    free = shutil.disk_usage(folder).free
    kinds = ", ".join(f"{kind} {size_in_words(size)}" for kind, size in vars(disk).items())
    return [
        line("disk", f"{size_in_words(disk.most)} at one time: {kinds}"),
        line("", f"{size_in_words(free)} free on the disk of {folder}"),
        *([line("", "THE DISK HAS NO ROOM FOR IT")] if disk.most > free else []),
    ]


def _span(values: np.ndarray) -> str:
    least, most = int(values.min()), int(values.max())
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def line(label: str, text: str) -> str:
    return f"{label:<12}{text}"
