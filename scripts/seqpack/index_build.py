"""Building the index: one streaming pass over the FASTA, then a sort.

The pass spills tokens, ids and descriptions to unnamed temporary files and keeps about 50 bytes a
record in memory; duplicates and order are then found by sorting those small columns.
"""

from __future__ import annotations

import itertools
import json
import logging
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import h5py
import numpy as np

import seqpack
from seqpack.errors import SeqpackError
from seqpack.fasta import FastaFile, FastaRecord
from seqpack.files import name_errors, refuse_to_replace, whole_or_absent
from seqpack.hdf5 import new_hdf5, write_attributes
from seqpack.index_format import INDEX_FORMAT, Fate, content_digest
from seqpack.length_policy import LengthPolicy
from seqpack.models.registry import ModelSource, find_model
from seqpack.order import reused_last, unique_sequences
from seqpack.plan import choose_pack_tokens, plan_packs
from seqpack.reuse import Source, find_reused, note_sources, require_policies
from seqpack.reused_vectors import require_values
from seqpack.tokenizing import DIGEST_BYTES, RecordTokenizer, make_tokenizer

COPY_BYTES = 16 << 20

log = logging.getLogger(__name__)


@dataclass
class _Spill:
    """A growing column of variable-length values: bytes on disk, their lengths in memory."""

    file: IO[bytes]
    lengths: list[np.ndarray] = field(default_factory=list)

    def append(self, data: bytes, lengths: np.ndarray) -> None:
        self.file.write(data)
        self.lengths.append(lengths)

    def append_texts(self, texts: list[str]) -> None:
        values = [text.encode() for text in texts]
        self.append(b"".join(values), np.fromiter(map(len, values), np.int64, len(values)))

    def offsets(self) -> np.ndarray:
        """Return int64 (n + 1,)."""
        return _offsets(np.concatenate(self.lengths))

    def mapped(self, dtype: type = np.uint8) -> np.ndarray:
        """Return all of it as a memory map."""
        self.file.flush()
        size = self.file.tell() // np.dtype(dtype).itemsize
        return np.memmap(self.file, dtype, mode="r", shape=(size,)) if size else np.empty(0, dtype)


@dataclass
class _Records:
    """What the pass has kept of the records, in input order."""

    ids: _Spill
    descriptions: _Spill
    tokens: _Spill
    lengths: list[np.ndarray] = field(default_factory=list)
    digests: bytearray = field(default_factory=bytearray)
    num_segments: list[np.ndarray] = field(default_factory=list)
    segment_tokens: list[np.ndarray] = field(default_factory=list)
    segment_lengths: list[np.ndarray] = field(default_factory=list)


def build_index(fasta: Path, output: Path, model: str, policy: LengthPolicy, reuse: Sequence[Path] = ()) -> None:
    """Write `index.h5` (see `seqpack.index_format`) from a FASTA file.

    Args:
        fasta: plain, gzip, bgzip or zstd.
        output: the index; appears only when it is whole.
        model: the model's name (`seqpack.models.registry`), recorded for the later stages; its family says what
            letters and tokens there are.
        policy: what is done with long sequences.
        reuse: earlier results, whose vectors of identical sequences are not computed again (`seqpack.reuse`).

    Raises:
        SeqpackError: input that can't be used; names the file, the record number and the id.
    """
    for path in (fasta, *reuse):
        refuse_to_replace(path, output)
    output.parent.mkdir(parents=True, exist_ok=True)
    model_source = find_model(model)
    source = FastaFile(fasta)
    tokenizer = make_tokenizer(model_source, fasta, policy)
    sources = require_policies(reuse, tokenizer.name, tokenizer.letter_policy, policy)
    with (
        name_errors(output.parent),
        tempfile.TemporaryFile(dir=output.parent) as ids,
        tempfile.TemporaryFile(dir=output.parent) as descriptions,
        tempfile.TemporaryFile(dir=output.parent) as tokens,
    ):
        records = _Records(_Spill(ids), _Spill(descriptions), _Spill(tokens))
        for block in source.blocks():
            _take(records, block, tokenizer)
        with whole_or_absent(output) as temporary, new_hdf5(temporary) as file:
            _write(file, records, source, tokenizer, policy, model_source, sources)


def _take(records: _Records, block: list[FastaRecord], tokenizer: RecordTokenizer) -> None:
    taken = tokenizer(block)
    records.digests.extend(taken.digests)
    records.lengths.append(taken.lengths)
    records.tokens.append(taken.tokens, taken.num_tokens)
    records.num_segments.append(taken.num_segments)
    records.segment_tokens.append(taken.segment_tokens)
    records.segment_lengths.append(taken.segment_lengths)
    records.ids.append_texts([record.id for record in block])
    records.descriptions.append_texts([record.description for record in block])


def _write(
    file: h5py.File,
    records: _Records,
    source: FastaFile,
    tokenizer: RecordTokenizer,
    policy: LengthPolicy,
    model: ModelSource,
    sources: list[Source],
) -> None:
    lengths = np.concatenate(records.lengths)
    digests = np.frombuffer(records.digests, np.uint8).reshape(-1, DIGEST_BYTES)
    too_long = (lengths > policy.max_length) & (policy.max_length > 0)
    rejected = too_long if policy.long_sequences == "reject" else np.zeros(len(lengths), bool)
    if rejected.all():
        raise SeqpackError(
            f"{source.path}: all {len(lengths)} records are longer than max_length={policy.max_length} and rejected; "
            "nothing is left to embed"
        )
    record_offsets = records.tokens.offsets()
    first_records, rows = unique_sequences(digests, np.diff(record_offsets), rejected)
    reused_files, reused_rows = find_reused(digests[first_records], sources)
    require_values(sources, reused_files)
    first_records, rows, order = reused_last(first_records, rows, reused_files >= 0)
    num_computed = int(np.count_nonzero(reused_files < 0))

    fates = np.full(len(lengths), Fate.DUPLICATE, np.uint8)
    fate_of_long = Fate.WINDOWED if policy.long_sequences == "window" else Fate.TRUNCATED
    fates[first_records] = np.where(too_long[first_records], fate_of_long, Fate.EMBEDDED)
    fates[rejected] = Fate.REJECTED
    fates[first_records[num_computed:]] = Fate.REUSED

    token_offsets = _offsets(np.diff(record_offsets)[first_records])
    num_tokens = int(token_offsets[num_computed])
    pack_tokens = choose_pack_tokens(num_tokens)
    pack_offsets = plan_packs(token_offsets[: num_computed + 1], pack_tokens)
    rest = num_computed + plan_packs(token_offsets[num_computed:], pack_tokens)[1:]  # blocks of the reused ones

    file["record_id_offsets"] = records.ids.offsets()
    file["record_description_offsets"] = records.descriptions.offsets()
    file["record_lengths"] = lengths
    file["record_fates"] = fates
    file["record_rows"] = rows
    file["token_offsets"] = token_offsets
    file["sequence_digests"] = digests[first_records]
    file["sequence_records"] = first_records
    file["pack_offsets"] = pack_offsets
    file["reused_files"] = reused_files[order][num_computed:]
    file["reused_rows"] = reused_rows[order][num_computed:]
    num_segments = _write_segments(file, records, first_records)
    _copy(file, "record_ids", records.ids.mapped())
    _copy(file, "record_descriptions", records.descriptions.mapped())
    spilled = records.tokens.mapped(tokenizer.dtype)
    blocks = np.concatenate((pack_offsets, rest))
    checksums = _write_tokens(file, spilled, record_offsets, first_records, token_offsets, blocks)
    file["pack_checksums"] = checksums[: len(pack_offsets) - 1]

    counts = {fate.name.lower(): int(np.count_nonzero(fates == fate)) for fate in Fate}
    # What the digest covers besides the datasets.
    decisive = {
        "tokenizer": tokenizer.name,
        "letter_policy": tokenizer.letter_policy,
        **asdict(policy),
        "pack_tokens": pack_tokens,
        "reuse": note_sources(sources),
    }
    embedded = lengths[first_records[:num_computed]].astype(np.int64)
    if policy.long_sequences == "truncate":
        embedded = np.minimum(embedded, policy.max_length)
    totals = {
        "num_records": len(lengths),
        "num_sequences": len(first_records),
        "num_reused": len(first_records) - num_computed,
        "num_segments": num_segments,
        "num_tokens": num_tokens,
        "num_residues": int(embedded.sum()),
        "num_packs": len(pack_offsets) - 1,
    }
    attributes = {
        "index_format": INDEX_FORMAT,
        "seqpack_version": seqpack.__version__,
        "model": model.name,
        "family": model.family,
        "source_path": str(source.path).encode(errors="backslashreplace").decode(),  # a path may be no UTF-8
        "source_size": source.size,
        "source_sha256": source.sha256,
        **decisive,
        "letter_counts": json.dumps(tokenizer.letter_counts()),
        "fate_counts": json.dumps(counts),
        **totals,
        "index_digest": content_digest(file, decisive),
    }
    write_attributes(file, attributes)
    _report(source, totals, counts, tokenizer.letter_counts(), policy)
    for number, reused in enumerate(sources):
        log.info("reused: %d sequences from %s", np.count_nonzero(reused_files == number), reused.path)


def _write_segments(file: h5py.File, records: _Records, first_records: np.ndarray) -> int:
    """Gather the unique sequences' segments in order, unless each is but one; return how many there are."""
    of_record = np.concatenate(records.num_segments)
    counts = of_record[first_records].astype(np.int64)
    offsets = segment_offsets = np.empty(0, np.int64)
    lengths = np.empty(0, np.int32)
    if (counts > 1).any():
        begins = _offsets(of_record)[first_records]
        offsets = _offsets(counts)
        chosen = np.repeat(begins - offsets[:-1], counts) + np.arange(offsets[-1])
        segment_offsets = _offsets(np.concatenate(records.segment_tokens)[chosen])
        lengths = np.concatenate(records.segment_lengths)[chosen]
    file["sequence_segments"] = offsets
    file["segment_offsets"] = segment_offsets
    file["segment_lengths"] = lengths
    return int(counts.sum())


def _offsets(lengths: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _copy(file: h5py.File, name: str, values: np.ndarray) -> None:
    dataset = file.create_dataset(name, values.shape, values.dtype)
    for start in range(0, len(values), COPY_BYTES):
        dataset[start : start + COPY_BYTES] = values[start : start + COPY_BYTES]


def _write_tokens(
    file: h5py.File,
    spilled: np.ndarray,
    record_offsets: np.ndarray,
    first_records: np.ndarray,
    token_offsets: np.ndarray,
    blocks: np.ndarray,
) -> np.ndarray:
    """Gather the unique sequences' tokens in order, block by block, as packs are; return the blocks' checksums."""
    dataset = file.create_dataset("tokens", (int(token_offsets[-1]),), spilled.dtype)
    view = memoryview(spilled)
    starts, ends = record_offsets[first_records], record_offsets[first_records + 1]
    checksums = np.empty(len(blocks) - 1, np.uint32)
    waiting = bytearray()  # of several blocks: a write of each takes as long as its gathering
    written = 0
    for block, (first, last) in enumerate(itertools.pairwise(blocks.tolist())):
        spans = zip(starts[first:last].tolist(), ends[first:last].tolist(), strict=True)
        tokens = b"".join([view[start:end] for start, end in spans])
        checksums[block] = zlib.crc32(tokens)
        waiting += tokens
        if len(waiting) >= COPY_BYTES or last == len(first_records):
            dataset[written : token_offsets[last]] = np.frombuffer(waiting, spilled.dtype)
            waiting, written = bytearray(), token_offsets[last]
    return checksums


def _report(
    source: FastaFile, totals: dict[str, int], fates: dict[str, int], letters: dict[str, int], policy: LengthPolicy
) -> None:
    log.info(
        "%s: %d records, %d unique sequences, %d tokens to compute in %d packs",
        *(source.path, totals["num_records"], totals["num_sequences"], totals["num_tokens"], totals["num_packs"]),
    )
    log.info("fates: %s", ", ".join(f"{count} {fate}" for fate, count in fates.items() if count))
    for change, count in letters.items():
        if count:  # lower case marks repeats in genomes: nothing to worry about
            log.log(logging.INFO if change == "lower_case" else logging.WARNING, "letters: %s: %d", change, count)
    for fate in ("truncated", "rejected", "windowed"):
        if fates[fate]:
            log.warning("%d records are longer than max_length=%d and were %s", fates[fate], policy.max_length, fate)
