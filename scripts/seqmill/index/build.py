"""Building the index: one streaming pass over the FASTA, then a sort.

The pass spills tokens, ids and descriptions to unnamed temporary files and keeps about 50 bytes per record in memory.
Duplicates and the order are then found by sorting those small columns.
"""

import itertools
import json
import logging
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from seqmill.base.files import name_errors, refuse_shared, remove_abandoned, whole_or_absent
from seqmill.base.hdf5 import NewFile, new_hdf5, write_attributes
from seqmill.base.input_files import require_unchanged, shown_path
from seqmill.base.text_columns import offsets_of
from seqmill.errors import SeqmillError
from seqmill.index.fasta import FastaFile
from seqmill.index.order import find_reused, reused_last, unique_sequences
from seqmill.index.spill import Records, Spill
from seqmill.index.tokens import RecordTokenizer, make_tokenizer
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import ModelSource, find_model
from seqmill.spec.packing import choose_pack_tokens, plan_packs
from seqmill.store.index_format import INDEX_FORMAT, Fate, content_digest
from seqmill.store.reuse import Source, require_policies, require_values
from seqmill.version import __version__

COPY_BYTES = 16 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Origin:
    """The inputs of an index: FASTA, model, policies, and earlier results to reuse."""

    fasta: FastaFile
    model: ModelSource
    tokenizer: RecordTokenizer
    policy: LengthPolicy
    reuse: list[Source]


@dataclass(frozen=True)
class _Arranged:
    """The records in the index's order, before anything is written."""

    columns: dict[str, np.ndarray]  # datasets by name (`seqmill.store.index_format`), in the order of writing
    record_offsets: np.ndarray  # int64 (num_records + 1,), where each record's spilled tokens begin
    blocks: np.ndarray  # int64, sequence numbers: where packs begin, then blocks of reused sequences, and the end
    pack_tokens: int  # as in the index
    totals: dict[str, int]  # attributes of the index
    num_reused: list[int]  # for each earlier result, the number of vectors taken from it


def build_index(fasta: Path, output: Path, model: str, policy: LengthPolicy, reuse: Sequence[Path] = ()) -> None:
    """Write `index.h5` (see `seqmill.store.index_format`) from a FASTA file.

    Args:
        fasta: plain, gzip, bgzip or zstd.
        output: the index; it appears only when it is whole.
        model: the model's name (`seqmill.spec.models`), recorded for later stages; its family determines letters and
            tokens.
        policy: for long sequences.
        reuse: earlier results, whose vectors of identical sequences are not computed again (`seqmill.store.reuse`).

    Raises:
        SeqmillError: unusable input; the message names the file, the record number and the id.
    """
    model_source = find_model(model)
    refuse_shared([output], [fasta, *reuse, *model_source.files])
    output.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned([output])
    tokenizer = make_tokenizer(model_source, fasta, policy)
    sources = require_policies(reuse, tokenizer.name, tokenizer.letter_policy, policy)
    origin = _Origin(FastaFile(fasta), model_source, tokenizer, policy, sources)
    with (
        name_errors(output.parent),
        tempfile.TemporaryFile(dir=output.parent) as ids,
        tempfile.TemporaryFile(dir=output.parent) as descriptions,
        tempfile.TemporaryFile(dir=output.parent) as tokens,
    ):
        records = Records(Spill(ids), Spill(descriptions), Spill(tokens))
        for block in origin.fasta.blocks():
            records.append(block, tokenizer(block))
        arranged = _arrange(records, origin)  # before the HDF5 file is open, which delays signals
        with whole_or_absent(output) as temporary:
            with new_hdf5(temporary) as file:
                _write(file, records, arranged, origin)
            require_unchanged(fasta, origin.fasta.stamp)  # the index would be newer than records appended meanwhile
    remove_abandoned([output])  # some may have become old enough


def _arrange(records: Records, origin: _Origin) -> _Arranged:
    """Find duplicates and sequences to reuse, and determine the order, the fates and the packs."""
    policy = origin.policy
    lengths, digests = np.concatenate(records.lengths), records.digest_rows()
    too_long = (lengths > policy.max_length) & (policy.max_length > 0)
    rejected = too_long if policy.long_sequences == "reject" else np.zeros(len(lengths), bool)
    if rejected.all():
        raise SeqmillError(
            f"{origin.fasta.path}: all {len(lengths)} records are longer than max_length={policy.max_length} and "
            "rejected; nothing is left to embed"
        )
    record_offsets = records.tokens.offsets()
    first_records, rows = unique_sequences(digests, np.diff(record_offsets), rejected)
    reused_files, reused_rows = find_reused(digests[first_records], origin.reuse)
    require_values(origin.reuse, reused_files)
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
        "num_sequences": len(first_records),
        "num_reused": len(first_records) - num_computed,
        "num_segments": num_segments,
        "num_tokens": int(token_offsets[num_computed]),
        "num_residues": int(embedded.sum()),
        "num_packs": len(pack_offsets) - 1,
    }
    num_reused = [int(np.count_nonzero(reused_files == number)) for number in range(len(origin.reuse))]
    blocks = np.concatenate((pack_offsets, blocks_of_reused))
    return _Arranged(columns, record_offsets, blocks, pack_tokens, totals, num_reused)


def _fates(
    first_records: np.ndarray, num_computed: int, too_long: np.ndarray, rejected: np.ndarray, policy: LengthPolicy
) -> np.ndarray:
    fates = np.full(len(rejected), Fate.DUPLICATE, np.uint8)
    fate_of_long = Fate.WINDOWED if policy.long_sequences == "window" else Fate.TRUNCATED
    fates[first_records] = np.where(too_long[first_records], fate_of_long, Fate.EMBEDDED)
    fates[rejected] = Fate.REJECTED
    fates[first_records[num_computed:]] = Fate.REUSED
    return fates


def _write(file: NewFile, records: Records, arranged: _Arranged, origin: _Origin) -> None:
    file["record_id_offsets"] = records.ids.offsets()
    file["record_description_offsets"] = records.descriptions.offsets()
    for name, values in arranged.columns.items():
        file[name] = values
        file.check()
    _copy(file, "record_ids", records.ids.mapped())
    _copy(file, "record_descriptions", records.descriptions.mapped())
    checksums = _write_tokens(file, records.tokens.mapped(origin.tokenizer.dtype), arranged)
    file["pack_checksums"] = checksums[: arranged.totals["num_packs"]]

    fates = arranged.columns["record_fates"]
    fate_counts = {fate.name.lower(): int(np.count_nonzero(fates == fate)) for fate in Fate}
    settings = {  # the digest covers these and the datasets
        "tokenizer": origin.tokenizer.name,
        "letter_policy": origin.tokenizer.letter_policy,
        **asdict(origin.policy),
        "pack_tokens": arranged.pack_tokens,
        "reuse": json.dumps([source.note for source in origin.reuse]),
    }
    attributes = {
        "index_format": INDEX_FORMAT,
        "seqmill_version": __version__,
        "model": origin.model.name,
        "family": origin.model.family,
        "source_path": shown_path(origin.fasta.path),
        "source_size": origin.fasta.size,
        "source_sha256": origin.fasta.sha256,
        "source_stamp": origin.fasta.stamp,
        **settings,
        "letter_counts": json.dumps(origin.tokenizer.letter_counts()),
        "fate_counts": json.dumps(fate_counts),
        **arranged.totals,
        "index_digest": content_digest(file, settings, file.check),
    }
    write_attributes(file, attributes)
    _report(origin, arranged, fate_counts)


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


def _copy(file: NewFile, name: str, values: np.ndarray) -> None:
    dataset = file.create_dataset(name, values.shape, values.dtype)
    for start in range(0, len(values), COPY_BYTES):
        dataset[start : start + COPY_BYTES] = values[start : start + COPY_BYTES]
        file.check()


def _write_tokens(file: NewFile, spilled: np.ndarray, arranged: _Arranged) -> np.ndarray:
    """Write the unique sequences' tokens in order, block by block; return the blocks' checksums (CRC-32)."""
    first_records, token_offsets = (arranged.columns[name] for name in ("sequence_records", "token_offsets"))
    dataset = file.create_dataset("tokens", (int(token_offsets[-1]),), spilled.dtype)
    view = memoryview(spilled)
    starts, ends = arranged.record_offsets[first_records], arranged.record_offsets[first_records + 1]
    checksums = np.empty(len(arranged.blocks) - 1, np.uint32)
    waiting = bytearray()  # several blocks, because writing one takes as long as gathering it
    written = 0
    for block, (first, last) in enumerate(itertools.pairwise(arranged.blocks.tolist())):
        spans = zip(starts[first:last].tolist(), ends[first:last].tolist(), strict=True)
        tokens = b"".join([view[start:end] for start, end in spans])
        checksums[block] = zlib.crc32(tokens)
        waiting += tokens
        if len(waiting) >= COPY_BYTES or last == len(first_records):
            dataset[written : token_offsets[last]] = np.frombuffer(waiting, spilled.dtype)
            waiting, written = bytearray(), token_offsets[last]
            file.check()
    return checksums


def _report(origin: _Origin, arranged: _Arranged, fates: dict[str, int]) -> None:
    log.info(
        "%s: %d records, %d unique sequences, %d tokens to compute in %d packs",
        origin.fasta.path,
        *(arranged.totals[name] for name in ("num_records", "num_sequences", "num_tokens", "num_packs")),
    )
    log.info("fates: %s", ", ".join(f"{count} {fate}" for fate, count in fates.items() if count))
    for change, count in origin.tokenizer.letter_counts().items():
        if count:  # lower case is no warning: it marks repeats in genomes
            log.log(logging.INFO if change == "lower_case" else logging.WARNING, "letters: %s: %d", change, count)
    for fate in ("truncated", "rejected", "windowed"):
        if fates[fate]:
            length = origin.policy.max_length
            log.warning("%d records are longer than max_length=%d and were %s", fates[fate], length, fate)
    for number, reused in zip(arranged.num_reused, origin.reuse, strict=True):
        log.info("reused: %d sequences from %s", number, reused.path)
