"""Building the index: one streaming pass over the FASTA, then a sort.

The pass spills tokens, ids and descriptions to unnamed temporary files and keeps about 50 bytes per record in memory.
Duplicates and the order are then found by sorting those small columns.
"""

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
from seqmill.errors import SeqmillError
from seqmill.index.arrange import Arranged, arrange, count_fates, log_changes, token_blocks
from seqmill.index.fasta import FastaFile
from seqmill.index.spill import Records, Spill
from seqmill.index.tokens import RecordTokenizer, make_tokenizer
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import ModelSource, find_model
from seqmill.store.index_format import INDEX_FORMAT, content_digest
from seqmill.store.reuse import Source, require_policies
from seqmill.version import __version__

COPY_BYTES = 16 << 20
LEAVE_OUT = "set on_invalid: skip (--on-invalid skip) to leave out invalid records"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Origin:
    """The inputs of an index: FASTA, model, policies, and earlier results to reuse."""

    fasta: FastaFile
    model: ModelSource
    tokenizer: RecordTokenizer
    policy: LengthPolicy
    reuse: list[Source]


def build_index(
    fasta: Path,
    output: Path,
    model: str,
    policy: LengthPolicy,
    reuse: Sequence[Path] = (),
    on_invalid: str = "fail",
) -> None:
    """Write `index.h5` (see `seqmill.store.index_format`) from a FASTA file.

    Args:
        fasta: plain, gzip, bgzip or zstd.
        output: the index; it appears only when it is whole.
        model: the model's name (`seqmill.spec.models`), recorded for later stages; its family determines letters and
            tokens.
        policy: for long sequences.
        reuse: earlier results, whose vectors of identical sequences are not computed again (`seqmill.store.reuse`).
        on_invalid: fail if records are invalid, or skip them. It does not change the index of a file without any.

    Raises:
        SeqmillError: unusable input; the message names the file, the record number and the id; of invalid records the
            first 20.
    """
    model_source = find_model(model)
    refuse_shared([output], [fasta, *reuse, *model_source.files])
    output.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned([output])
    tokenizer = make_tokenizer(model_source, policy)
    sources = require_policies(reuse, tokenizer.name, tokenizer.letter_policy, policy)
    origin = _Origin(FastaFile(fasta), model_source, tokenizer, policy, sources)
    with (
        name_errors(output.parent),
        tempfile.TemporaryFile(dir=output.parent) as ids,
        tempfile.TemporaryFile(dir=output.parent) as descriptions,
        tempfile.TemporaryFile(dir=output.parent) as tokens,
    ):
        records = Records(Spill(ids), Spill(descriptions), Spill(tokens))
        invalid = records.read(origin.fasta.blocks(), str(fasta), tokenizer, on_invalid)
        if invalid.count and on_invalid == "fail":
            raise SeqmillError(invalid.refusal(str(fasta), LEAVE_OUT))
        if invalid.count:
            log.warning(invalid.warning(str(fasta)))
        arranged = arrange(records, policy, sources)  # before the HDF5 file is open, which delays signals
        if not arranged.totals["num_sequences"]:
            raise SeqmillError(f"{fasta}: {_nothing_left(arranged.totals, policy)}")
        with whole_or_absent(output) as temporary:
            with new_hdf5(temporary) as file:
                _write(file, records, arranged, origin)
            require_unchanged(fasta, origin.fasta.stamp)  # the index would be newer than records appended meanwhile
    remove_abandoned([output])  # some may have become old enough


def _nothing_left(totals: dict[str, int], policy: LengthPolicy) -> str:
    invalid, longer = totals["num_invalid"], totals["num_records"] - totals["num_invalid"]
    causes = [f"{invalid:,} invalid"] if invalid else []
    causes += [f"{longer:,} longer than max_length={policy.max_length}"] if longer else []
    return f"all records are rejected, and nothing is left to embed: {', '.join(causes)}"


def _write(file: NewFile, records: Records, arranged: Arranged, origin: _Origin) -> None:
    file["record_id_offsets"] = records.ids.offsets()
    file["record_description_offsets"] = records.descriptions.offsets()
    for name, values in arranged.columns.items():
        file[name] = values
        file.check()
    _copy(file, "record_ids", records.ids.mapped())
    _copy(file, "record_descriptions", records.descriptions.mapped())
    checksums = _write_tokens(file, records.tokens.mapped(origin.tokenizer.dtype), arranged)
    file["pack_checksums"] = checksums[: arranged.totals["num_packs"]]

    fate_counts = count_fates(arranged)
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
        "family": origin.model.family.name,
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


def _copy(file: NewFile, name: str, values: np.ndarray) -> None:
    dataset = file.create_dataset(name, values.shape, values.dtype)
    for start in range(0, len(values), COPY_BYTES):
        dataset[start : start + COPY_BYTES] = values[start : start + COPY_BYTES]
        file.check()


def _write_tokens(file: NewFile, spilled: np.ndarray, arranged: Arranged) -> np.ndarray:
    """Write the unique sequences' tokens in order, block by block; return the blocks' checksums (CRC-32)."""
    num_tokens = int(arranged.columns["token_offsets"][-1])
    dataset = file.create_dataset("tokens", (num_tokens,), spilled.dtype)
    checksums = np.empty(len(arranged.blocks) - 1, np.uint32)
    waiting = bytearray()  # several blocks, because writing one takes as long as gathering it
    written = 0
    for block, tokens in enumerate(token_blocks(spilled, arranged)):
        checksums[block] = zlib.crc32(tokens)
        waiting += tokens
        if len(waiting) >= COPY_BYTES or block == len(checksums) - 1:
            values = np.frombuffer(waiting, spilled.dtype)
            dataset[written : written + len(values)] = values
            waiting, written = bytearray(), written + len(values)
            file.check()
    return checksums


def _report(origin: _Origin, arranged: Arranged, fates: dict[str, int]) -> None:
    log.info(
        "%s: %d records, %d unique sequences, %d tokens to compute in %d packs",
        origin.fasta.path,
        *(arranged.totals[name] for name in ("num_records", "num_sequences", "num_tokens", "num_packs")),
    )
    log.info("fates: %s", ", ".join(f"{count} {fate}" for fate, count in fates.items() if count))
    too_long = fates["rejected"] - arranged.totals["num_invalid"]  # the others have had their warning
    log_changes(origin.tokenizer.letter_counts(), {**fates, "rejected": too_long}, origin.policy)
    for number, reused in zip(arranged.num_reused, origin.reuse, strict=True):
        log.info("reused: %d sequences from %s", number, reused.path)
