"""The arrangement of all records: duplicates, sequences to reuse, the order, the fates and the packs."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from seqmill.base.text_columns import offsets_of
from seqmill.index.order import find_reused, reused_last, unique_sequences
from seqmill.index.spill import Records
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.packing import choose_pack_tokens, plan_packs
from seqmill.store.index_format import Fate
from seqmill.store.reuse import Source, require_values

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arranged:
    """The records in the index's order, before any token is moved."""

    columns: dict[str, np.ndarray]  # datasets by name (`seqmill.store.index_format`), in the order of writing
    record_offsets: np.ndarray  # int64 (num_records + 1,), where each record's spilled tokens begin
    blocks: np.ndarray  # int64, sequence numbers: where packs begin, then blocks of reused sequences, and the end
    pack_tokens: int  # as in the index
    totals: dict[str, int]  # attributes of the index
    num_reused: list[int]  # for each earlier result, the number of vectors taken from it


def arrange(records: Records, policy: LengthPolicy, reuse: list[Source]) -> Arranged:
    """Find duplicates and sequences to reuse, and determine the order, the fates and the packs."""
    lengths, digests = np.concatenate(records.lengths), records.digest_rows()
    too_long = (lengths > policy.max_length) & (policy.max_length > 0)
    invalid = lengths == 0
    rejected = invalid | too_long if policy.long_sequences == "reject" else invalid
    record_offsets = records.tokens.offsets()
    first_records, rows = unique_sequences(digests, np.diff(record_offsets), rejected)
    reused_files, reused_rows = find_reused(digests[first_records], reuse)
    require_values(reuse, reused_files)
    first_records, rows, order = reused_last(first_records, rows, reused_files >= 0)
    num_computed = int(np.count_nonzero(reused_files < 0))

    token_offsets = offsets_of(np.diff(record_offsets)[first_records])
    pack_tokens = choose_pack_tokens(int(token_offsets[num_computed]))
    pack_offsets = plan_packs(token_offsets[: num_computed + 1], pack_tokens)
    blocks_of_reused = num_computed + plan_packs(token_offsets[num_computed:], pack_tokens)[1:]
    embedded = lengths[first_records[:num_computed]].astype(np.int64)
    if policy.long_sequences == "truncate":
        embedded = np.minimum(embedded, policy.max_length)
    segments, num_segments = _segments(records, first_records)
    columns = {
        "record_lengths": lengths,
        "record_fates": _fates(first_records, num_computed, too_long, rejected, policy),
        "record_rows": rows,
        "token_offsets": token_offsets,
        "sequence_digests": digests[first_records],
        "sequence_records": first_records,
        "pack_offsets": pack_offsets,
        "reused_files": reused_files[order][num_computed:],
        "reused_rows": reused_rows[order][num_computed:],
        **segments,
    }
    totals = {
        "num_records": len(lengths),
        "num_invalid": int(np.count_nonzero(invalid)),
        "num_sequences": len(first_records),
        "num_reused": len(first_records) - num_computed,
        "num_segments": num_segments,
        "num_tokens": int(token_offsets[num_computed]),
        "num_residues": int(embedded.sum()),
        "num_packs": len(pack_offsets) - 1,
    }
    num_reused = [int(np.count_nonzero(reused_files == number)) for number in range(len(reuse))]
    blocks = np.concatenate((pack_offsets, blocks_of_reused))
    return Arranged(columns, record_offsets, blocks, pack_tokens, totals, num_reused)


def _fates(
    first_records: np.ndarray, num_computed: int, too_long: np.ndarray, rejected: np.ndarray, policy: LengthPolicy
) -> np.ndarray:
    fates = np.full(len(rejected), Fate.DUPLICATE, np.uint8)
    fate_of_long = Fate.WINDOWED if policy.long_sequences == "window" else Fate.TRUNCATED
    fates[first_records] = np.where(too_long[first_records], fate_of_long, Fate.EMBEDDED)
    fates[rejected] = Fate.REJECTED
    fates[first_records[num_computed:]] = Fate.REUSED
    return fates


def _segments(records: Records, first_records: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
    """Return the datasets of the unique sequences' segments, empty if all have one segment, and the total number."""
    of_record = np.concatenate(records.num_segments)
    counts = of_record[first_records].astype(np.int64)
    offsets = segment_offsets = np.empty(0, np.int64)
    lengths = np.empty(0, np.int32)
    if (counts > 1).any():
        begins = offsets_of(of_record)[first_records]
        offsets = offsets_of(counts)
        chosen = np.repeat(begins - offsets[:-1], counts) + np.arange(offsets[-1])
        segment_offsets = offsets_of(np.concatenate(records.segment_tokens)[chosen])
        lengths = np.concatenate(records.segment_lengths)[chosen]
    columns: dict[str, np.ndarray] = {
        "sequence_segments": offsets,
        "segment_offsets": segment_offsets,
        "segment_lengths": lengths,
    }
    return columns, int(counts.sum())


def token_blocks(spilled: np.ndarray, arranged: Arranged) -> Iterator[bytes]:
    """Yield the tokens of each of `arranged.blocks`, the unique sequences end to end; `spilled` has all records'."""
    view = memoryview(spilled)
    first_records = arranged.columns["sequence_records"]
    starts, ends = arranged.record_offsets[first_records], arranged.record_offsets[first_records + 1]
    for first, last in itertools.pairwise(arranged.blocks.tolist()):
        spans = zip(starts[first:last].tolist(), ends[first:last].tolist(), strict=True)
        yield b"".join([view[start:end] for start, end in spans])


def count_fates(arranged: Arranged) -> dict[str, int]:
    """Return the number of records of each fate, by its name in lower case."""
    fates = arranged.columns["record_fates"]
    return {fate.name.lower(): int(np.count_nonzero(fates == fate)) for fate in Fate}


def log_changes(letters: dict[str, int], fates: dict[str, int], policy: LengthPolicy) -> None:
    """Log how many letters were changed, and how many records are too long for the policy.

    `fates` are numbers of records; those "rejected" are without the invalid ones.
    """
    for change, count in letters.items():
        if count:  # lower case is no warning: it marks repeats in genomes
            log.log(logging.INFO if change == "lower_case" else logging.WARNING, "letters: %s: %d", change, count)
    for fate in ("truncated", "rejected", "windowed"):
        if fates[fate]:
            log.warning("longer than max_length=%d and %s: %d records", policy.max_length, fate, fates[fate])
