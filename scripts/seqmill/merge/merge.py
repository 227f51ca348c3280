"""The merge: verified shards to one file in the order of the FASTA, a table of fates, a manifest."""

from __future__ import annotations

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from seqmill.base.files import (
    fsync,
    json_text,
    name_errors,
    refuse_folder,
    refuse_shared,
    remove_abandoned,
    remove_left,
    sha256_of_file,
    whole_or_absent,
)
from seqmill.base.hdf5 import new_hdf5, reserve_dataset, sha256_around, write_attributes, write_strings
from seqmill.base.input_files import InputFile, find_change
from seqmill.base.locks import remove_free_locks
from seqmill.base.signals import held_back_signals
from seqmill.base.text_columns import split_bytes, texts_end_to_end
from seqmill.base.words import size_in_words
from seqmill.errors import SeqmillError
from seqmill.merge.manifest import computed_by, manifest_of, worst_audit
from seqmill.merge.records import final_fates, has_row, write_records
from seqmill.merge.residues import ResidueLayout, write_residues
from seqmill.merge.reused import ReusedVectors
from seqmill.merge.vectors import gather_vectors, write_outputs
from seqmill.merge.verify import verify_shards
from seqmill.spec.fingerprint import Fingerprint
from seqmill.spec.outputs import Outputs, dataset_name, residue_dataset
from seqmill.store.embeddings import EMBEDDINGS_FORMAT
from seqmill.store.index import Index, open_index
from seqmill.store.index_format import Fate
from seqmill.store.layout import parts_folder
from seqmill.store.parts import PartStore
from seqmill.store.shard_checks import VerifiedShard
from seqmill.version import __version__

# What embeddings.h5 repeats of the index's attributes.
INDEX_ATTRIBUTES = (
    "source_path",
    "source_size",
    "source_sha256",
    "tokenizer",
    "letter_policy",
    "letter_counts",
    "long_sequences",
    "max_length",
    "window",
    "stride",
    "strand",
    "num_records",
    "num_sequences",
    "num_reused",
)

log = logging.getLogger(__name__)


def merge_shards(
    index_path: Path,
    shard_paths: list[Path],
    status_paths: list[Path],
    output: Path,
    records: Path,
    manifest: Path,
    dtype: str = "float32",
    fasta: Path | None = None,
) -> None:
    """Verify the shards and write the three results; a failed check writes nothing.

    Args:
        index_path: the index the shards were made from.
        shard_paths, status_paths: one of each per rank, in the same order.
        output: embeddings.h5 to write.
        records: records.tsv.gz to write.
        manifest: manifest.json to write.
        dtype: of the embeddings in it: float32 or float16.
        fasta: the file that is asked for; the index must have been made from it as it is now. None: not compared.

    Raises:
        SeqmillError: a check failed; names the shard and what is wrong. A value is beyond float16. No record has an
            embedding.
    """
    index = open_index(index_path)
    if fasta is not None:
        require_fasta(index, fasta)
    results = (output, records, manifest)
    reused_paths = (Path(note["path"]) for note in index.reuse)
    refuse_shared(results, (index_path, *shard_paths, *status_paths, *reused_paths))
    for result in results:
        refuse_folder(result)
    remove_abandoned(results)
    start = time.perf_counter()
    shards = verify_shards(index, shard_paths, status_paths)
    reused = ReusedVectors(index, shards[0].shard.fingerprint, dtype)
    verified = time.perf_counter()
    quarantined = np.concatenate([found.shard.quarantined_rows for found in shards])
    fates = final_fates(index, quarantined)
    kept = np.flatnonzero(has_row(fates))
    if not len(kept):
        raise SeqmillError(
            f"{index_path}: none of its {index.num_records} records has a finite embedding, so there is nothing to "
            f"deliver; check the weights, or compute in precision float32"
        )
    fate_counts = {fate.name.lower(): int(np.count_nonzero(fates == fate)) for fate in Fate}
    with (
        ExitStack() as held,
        whole_or_absent(output) as new_output,
        whole_or_absent(manifest) as new_manifest,
        whole_or_absent(records) as new_records,
    ):
        # Side by side: the table is work for Python, the embeddings for the disk.
        with ThreadPoolExecutor(1) as thread:
            unwanted = Event()
            table = thread.submit(write_records, new_records, index, quarantined, unwanted)
            try:
                digest = _write_embeddings(new_output, index, shards, reused, kept, fate_counts, dtype)
                table.result()
            finally:
                unwanted.set()  # it is done, or the embeddings have failed and no one is to wait for it
        content = manifest_of(index, shards, reused, fate_counts)
        content["outputs"] = {
            output.name: {
                "rows": len(kept),
                "hidden_dim": _width(shards) // len(_outputs(shards)),
                "embeddings_sha256": digest,
                **sha256_around(new_output, "embeddings"),
            },
            records.name: {"rows": index.num_records, "sha256": sha256_of_file(new_records)},
        }
        content["seconds"] = {
            "verify": round(verified - start, 3),
            "write": round(time.perf_counter() - verified, 3),
        }
        with name_errors(new_manifest):
            new_manifest.write_text(json_text(content), encoding="utf-8")
        for new in (new_output, new_manifest, new_records):
            fsync(new)  # now, as it may take minutes: what follows is the work of a moment
        held.enter_context(held_back_signals())
        # The old result goes before the others are replaced, and the outermost file gets its name last: whenever this
        # is killed, if embeddings.h5 is there, so are the others, and they are its own.
        output.unlink(missing_ok=True)
        fsync(output.parent)
    hidden_dim = content["outputs"][output.name]["hidden_dim"]
    log.info("%s: %d embeddings of %d dimensions from %d shards", output, len(kept), hidden_dim, len(shards))
    for source in content["reuse"]:
        log.info("reused: %d sequences from %s", source["sequences"], source["path"])
    if len(kinds := computed_by(shards, reused)) > 1:
        log.warning("several kinds of device or kernel: another run may differ by rounding: %s", "; ".join(kinds))
    if fate_counts["quarantined"]:
        log.warning(
            "%d RECORDS ARE QUARANTINED: they have no finite embedding and are not in %s; %s names them",
            fate_counts["quarantined"],
            output,
            records,
        )
    for found in shards:
        if found.status.audit.get("verdict") == "warn":
            log.warning("%s: its audit failed or found large errors: %s", found.shard.path, found.status.audit)
    if shards[0].status.warning:
        log.warning(shards[0].status.warning)
    _remove_what_was_left(shard_paths, index, shards[0].shard.fingerprint)
    remove_abandoned(results)  # what was not old enough before


def require_fasta(index: Index, fasta: Path) -> None:
    """Raise a SeqmillError if an index was made from another FASTA, or if that has changed since."""
    if change := find_change([InputFile.fasta_of(index.attributes)], [fasta], sha256_of_file):
        raise SeqmillError(f"{index.path} was made from {change.before}, not from {change.now}; run again")


def _remove_what_was_left(shards: list[Path], index: Index, fingerprint: Fingerprint) -> None:
    """Remove what killed workers have left, those of another number of shards included; name what else is there."""
    beside, folder = shards[0].parent, parts_folder(shards[0])
    remove_free_locks(beside)
    for place in (beside, folder):
        remove_left(place)
    PartStore(folder, index, fingerprint).clear()
    if left := list(folder.glob("*.part.h5")):
        num_bytes = sum(path.stat().st_size for path in left)
        log.warning(
            "%s: %d part files of runs with other settings stay there, %s; remove the folder if none will go on",
            *(folder, len(left), size_in_words(num_bytes)),
        )
    merged = {path.name for path in shards}
    if others := [path for path in beside.glob("shard_*-of-*.h5") if path.name not in merged]:
        num_bytes = sum(path.stat().st_size for path in others)
        log.warning(
            "%s: %d shards of another number of shards stay there, %s; remove them if no run will go on from them",
            *(beside, len(others), size_in_words(num_bytes)),
        )
    with suppress(OSError):  # what else is in it is not ours to judge
        folder.rmdir()


def _write_embeddings(
    path: Path,
    index: Index,
    shards: list[VerifiedShard],
    reused: ReusedVectors,
    kept: np.ndarray,
    fate_counts: dict[str, int],
    dtype: str,
) -> str:
    """Write embeddings.h5; return the SHA-256 of the bytes of `embeddings`, which is the first output."""
    names = _datasets(shards)
    shape = (len(kept), _width(shards) // len(names))
    residues = ResidueLayout.of(index, kept) if shards[0].shard.fingerprint.per_residue else None
    with new_hdf5(path) as file:
        write_attributes(file, _attributes(index, shards, reused, fate_counts))
        file["lengths"] = index.record_lengths[kept]
        file["sequence_digests"] = index.sequence_digests[index.record_rows[kept]]
        write_strings(file, "sequence_ids", kept, partial(_encoded_ids, index))
        for name in names:
            reserve_dataset(file, name, shape, dtype)
        if residues is not None:
            residues.reserve(file, _residue_datasets(shards), shape[1], shards[0].shard.fingerprint.per_residue)
    with write_outputs(path, names, dtype, lambda row: index.record_name(int(kept[row]))) as writer:
        for block in gather_vectors(index, [found.shard for found in shards], reused, kept):
            writer.append(block)
    if residues is not None:
        write_residues(path, residues, [found.shard for found in shards], _residue_datasets(shards))
    return writer.sha256(names[0])


def _encoded_ids(index: Index, records: np.ndarray) -> list[bytes]:
    return split_bytes(*texts_end_to_end(index.record_ids, index.record_id_offsets, records))


def _datasets(shards: list[VerifiedShard]) -> list[str]:
    """Return the names of the outputs' datasets, in their order."""
    return [output["dataset"] for output in _outputs(shards)]


def _layers(shards: list[VerifiedShard]) -> tuple[int, ...]:
    return tuple(map(int, shards[0].shard.fingerprint.layers.split(",")))


def _residue_datasets(shards: list[VerifiedShard]) -> list[str]:
    return [residue_dataset(layer, number == 0) for number, layer in enumerate(_layers(shards))]


def _outputs(shards: list[VerifiedShard]) -> list[dict[str, Any]]:
    outputs = Outputs(_layers(shards), tuple(shards[0].shard.fingerprint.pooling.split(",")))
    return [
        {"dataset": dataset_name(layer, pooling, number == 0), "layer": layer, "pooling": pooling}
        for number, (layer, pooling) in enumerate(outputs.pairs)
    ]


def _width(shards: list[VerifiedShard]) -> int:
    return shards[0].shard.embeddings.shape[1]


def _attributes(
    index: Index, shards: list[VerifiedShard], reused: ReusedVectors, fate_counts: dict[str, int]
) -> dict[str, Any]:
    """Return the attributes of embeddings.h5: no time and no host, so that equal results are equal files."""
    status = shards[0].status
    return {
        "embeddings_format": EMBEDDINGS_FORMAT,
        "seqmill_version": __version__,
        **shards[0].shard.fingerprint.attributes(),
        "num_layers": shards[0].shard.num_layers,
        "outputs": json.dumps(_outputs(shards)),
        "computed_by": "; ".join(computed_by(shards, reused)),
        "trained_weights": not status.warning,
        "warning": status.warning,
        **{name: index.attributes[name] for name in INDEX_ATTRIBUTES},
        "fate_counts": json.dumps(fate_counts),
        **worst_audit(shards, reused),
    }
