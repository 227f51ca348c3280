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
from seqmill.store.reuse import Source, note_sources, require_policies, require_values
from seqmill.version import __version__

COPY_BYTES = 16 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Arranged:
    """The records as they lie in the index, before anything is written.

    Attributes:
        columns: datasets by their names (`seqmill.store.index_format`), in the order in which they are written.
        record_offsets: int64 (num_records + 1,), where each record's tokens begin in the spilled ones.
        blocks: int64, in sequences: where packs begin, then blocks of the reused sequences, and the end.
        num_packs, pack_tokens, num_segments, num_residues: as in the index.
        num_reused: of each earlier result, how many sequences' vectors are taken from it.
    """

    columns: dict[str, np.ndarray]
    record_offsets: np.ndarray
    blocks: np.ndarray
    num_packs: int
    pack_tokens: int
    num_segments: int
    num_residues: int
    num_reused: list[int]


def build_index(fasta: Path, output: Path, model: str, policy: LengthPolicy, reuse: Sequence[Path] = ()) -> None:
    """Write `index.h5` (see `seqmill.store.index_format`) from a FASTA file.

    Args:
        fasta: plain, gzip, bgzip or zstd.
        output: the index; appears only when it is whole.
        model: the model's name (`seqmill.spec.models`), recorded for the later stages; its family says what
            letters and tokens there are.
        policy: what is done with long sequences.
        reuse: earlier results, whose vectors of identical sequences are not computed again (`seqmill.store.reuse`).

    Raises:
        SeqmillError: input that can't be used; names the file, the record number and the id.
    """
    model_source = find_model(model)
    refuse_shared([output], [fasta, *reuse, *model_source.files])
    output.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned([output])
    source = FastaFile(fasta)
    tokenizer = make_tokenizer(model_source, fasta, policy)
    sources = require_policies(reuse, tokenizer.name, tokenizer.letter_policy, policy)
    with (
        name_errors(output.parent),
        tempfile.TemporaryFile(dir=output.parent) as ids,
        tempfile.TemporaryFile(dir=output.parent) as descriptions,
        tempfile.TemporaryFile(dir=output.parent) as tokens,
    ):
        records = Records(Spill(ids), Spill(descriptions), Spill(tokens))
        for block in source.blocks():
            records.append(block, tokenizer(block))
        arranged = _arrange(records, fasta, policy, sources)  # before HDF5, which has to hold signals back
        with whole_or_absent(output) as temporary:
            with new_hdf5(temporary) as file:
                _write(file, records, arranged, source, tokenizer, policy, model_source, sources)
            require_unchanged(fasta, source.stamp)  # else records that are appended meanwhile would be lost for good
    remove_abandoned([output])  # what was not old enough before


def _arrange(records: Records, fasta: Path, policy: LengthPolicy, sources: list[Source]) -> _Arranged:
    """Find duplicates, what is reused, the order, the fates and the packs."""
    lengths, digests = np.concatenate(records.lengths), records.digest_rows()
    too_long = (lengths > policy.max_length) & (policy.max_length > 0)
    rejected = too_long if policy.long_sequences == "reject" else np.zeros(len(lengths), bool)
    if rejected.all():
        raise SeqmillError(
            f"{fasta}: all {len(lengths)} records are longer than max_length={policy.max_length} and rejected; "
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

    token_offsets = offsets_of(np.diff(record_offsets)[first_records])
    pack_tokens = choose_pack_tokens(int(token_offsets[num_computed]))
    pack_offsets = plan_packs(token_offsets[: num_computed + 1], pack_tokens)
    rest = num_computed + plan_packs(token_offsets[num_computed:], pack_tokens)[1:]  # blocks of the reused ones
    embedded = lengths[first_records[:num_computed]].astype(np.int64)
    if policy.long_sequences == "truncate":
        embedded = np.minimum(embedded, policy.max_length)
    segments, num_segments = _segments(records, first_records)
    columns = {
        "record_lengths": lengths,
        "record_fates": fates,
        "record_rows": rows,
        "token_offsets": token_offsets,
        "sequence_digests": digests[first_records],
        "sequence_records": first_records,
        "pack_offsets": pack_offsets,
        "reused_files": reused_files[order][num_computed:],
        "reused_rows": reused_rows[order][num_computed:],
        **segments,
    }
    return _Arranged(
        columns=columns,
        record_offsets=record_offsets,
        blocks=np.concatenate((pack_offsets, rest)),
        num_packs=len(pack_offsets) - 1,
        pack_tokens=pack_tokens,
        num_segments=num_segments,
        num_residues=int(embedded.sum()),
        num_reused=[int(np.count_nonzero(reused_files == number)) for number in range(len(sources))],
    )


def _write(
    file: NewFile,
    records: Records,
    arranged: _Arranged,
    source: FastaFile,
    tokenizer: RecordTokenizer,
    policy: LengthPolicy,
    model: ModelSource,
    sources: list[Source],
) -> None:
    columns, num_packs = arranged.columns, arranged.num_packs
    file["record_id_offsets"] = records.ids.offsets()
    file["record_description_offsets"] = records.descriptions.offsets()
    for name, values in columns.items():
        file[name] = values
        file.check()
    _copy(file, "record_ids", records.ids.mapped())
    _copy(file, "record_descriptions", records.descriptions.mapped())
    checksums = _write_tokens(file, records.tokens.mapped(tokenizer.dtype), arranged)
    file["pack_checksums"] = checksums[:num_packs]

    fates, first_records, token_offsets = (
        columns[name] for name in ("record_fates", "sequence_records", "token_offsets")
    )
    counts = {fate.name.lower(): int(np.count_nonzero(fates == fate)) for fate in Fate}
    # What the digest covers besides the datasets.
    decisive = {
        "tokenizer": tokenizer.name,
        "letter_policy": tokenizer.letter_policy,
        **asdict(policy),
        "pack_tokens": arranged.pack_tokens,
        "reuse": note_sources(sources),
    }
    num_computed = int(arranged.blocks[num_packs])
    totals = {
        "num_records": len(fates),
        "num_sequences": len(first_records),
        "num_reused": len(first_records) - num_computed,
        "num_segments": arranged.num_segments,
        "num_tokens": int(token_offsets[num_computed]),
        "num_residues": arranged.num_residues,
        "num_packs": num_packs,
    }
    attributes = {
        "index_format": INDEX_FORMAT,
        "seqmill_version": __version__,
        "model": model.name,
        "family": model.family,
        "source_path": shown_path(source.path),
        "source_size": source.size,
        "source_sha256": source.sha256,
        "source_stamp": source.stamp,
        **decisive,
        "letter_counts": json.dumps(tokenizer.letter_counts()),
        "fate_counts": json.dumps(counts),
        **totals,
        "index_digest": content_digest(file, decisive, file.check),
    }
    write_attributes(file, attributes)
    _report(source, totals, counts, tokenizer.letter_counts(), policy)
    for number, reused in zip(arranged.num_reused, sources, strict=True):
        log.info("reused: %d sequences from %s", number, reused.path)


def _segments(records: Records, first_records: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
    """Gather the unique sequences' segments in order, unless each is but one; return how many there are as well."""
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
    columns = {"sequence_segments": offsets, "segment_offsets": segment_offsets, "segment_lengths": lengths}
    return columns, int(counts.sum())


def _copy(file: NewFile, name: str, values: np.ndarray) -> None:
    dataset = file.create_dataset(name, values.shape, values.dtype)
    for start in range(0, len(values), COPY_BYTES):
        dataset[start : start + COPY_BYTES] = values[start : start + COPY_BYTES]
        file.check()


def _write_tokens(file: NewFile, spilled: np.ndarray, arranged: _Arranged) -> np.ndarray:
    """Gather the unique sequences' tokens in order, block by block, as packs are; return the blocks' checksums."""
    first_records, token_offsets = (arranged.columns[name] for name in ("sequence_records", "token_offsets"))
    dataset = file.create_dataset("tokens", (int(token_offsets[-1]),), spilled.dtype)
    view = memoryview(spilled)
    starts, ends = arranged.record_offsets[first_records], arranged.record_offsets[first_records + 1]
    checksums = np.empty(len(arranged.blocks) - 1, np.uint32)
    waiting = bytearray()  # of several blocks: a write of each takes as long as its gathering
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
