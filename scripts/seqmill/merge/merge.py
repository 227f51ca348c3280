"""The merge: verified shards to one file in the order of the FASTA, a table of fates, and a manifest."""

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Event
from typing import Any

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
from seqmill.base.hdf5 import new_hdf5, sha256_around, write_attributes
from seqmill.base.input_files import InputFile, find_change
from seqmill.base.locks import remove_free_locks
from seqmill.base.signals import held_back_signals
from seqmill.base.words import size_in_words
from seqmill.errors import SeqmillError
from seqmill.merge.manifest import manifest_of
from seqmill.merge.records import write_records
from seqmill.merge.residues import reserve_residues, write_residues
from seqmill.merge.vectors import gather_vectors, write_outputs
from seqmill.merge.verify import VerifiedSet, verify_shards
from seqmill.store.embeddings import EMBEDDINGS_FORMAT
from seqmill.store.index import Index, open_index
from seqmill.store.layout import parts_folder
from seqmill.store.parts import PartStore
from seqmill.version import __version__

# The attributes of the index that embeddings.h5 repeats.
INDEX_ATTRIBUTES = (
    *("source_path", "source_size", "source_sha256", "tokenizer", "letter_policy", "letter_counts"),
    *("long_sequences", "max_length", "window", "stride", "strand"),
    *("num_records", "num_sequences", "num_reused"),
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
    """Verify the shards and write the three results; if a check fails, nothing is written.

    Args:
        shard_paths, status_paths: one of each per rank, in the same order.
        output, records, manifest: embeddings.h5, records.tsv.gz and manifest.json.
        dtype: of the embeddings: float32 or float16.
        fasta: if given, the index must have been made from this file as it is now.

    Raises:
        SeqmillError: a check failed (names the shard and the fault), a value is beyond float16, or no record has an
            embedding.
    """
    index, results = open_index(index_path), (output, records, manifest)
    if fasta is not None:
        require_fasta(index, fasta)
    refuse_shared(results, (index_path, *shard_paths, *status_paths, *(Path(note["path"]) for note in index.reuse)))
    for result in results:
        refuse_folder(result)
    remove_abandoned(results)
    start = time.perf_counter()
    verified = verify_shards(index, shard_paths, status_paths, dtype)
    checked = time.perf_counter()
    with (
        ExitStack() as held,
        whole_or_absent(output) as new_output,
        whole_or_absent(manifest) as new_manifest,
        whole_or_absent(records) as new_records,
    ):
        digest = _write_tables(new_output, new_records, verified, dtype)
        content = manifest_of(verified)
        facts = {"rows": len(verified.kept), "hidden_dim": verified.hidden_dim, "embeddings_sha256": digest}
        content["outputs"] = {
            output.name: {**facts, **sha256_around(new_output, "embeddings")},
            records.name: {"rows": index.num_records, "sha256": sha256_of_file(new_records)},
        }
        content["seconds"] = {"verify": round(checked - start, 3), "write": round(time.perf_counter() - checked, 3)}
        with name_errors(new_manifest):
            new_manifest.write_text(json_text(content), encoding="utf-8")
        for new in (new_output, new_manifest, new_records):
            fsync(new)  # now, because it may take minutes: the steps that follow are quick
        held.enter_context(held_back_signals())
        # The old embeddings.h5 is removed before the other files are replaced, and the new one is renamed last. So
        # whenever this is killed: if embeddings.h5 exists, the other files exist and belong to it.
        output.unlink(missing_ok=True)
        fsync(output.parent)
    _log_result(verified, output, records)
    _remove_leftovers(verified)
    remove_abandoned(results)  # files that were not old enough before


def require_fasta(index: Index, fasta: Path) -> None:
    """Raise a SeqmillError if an index was made from another FASTA, or if the FASTA has changed since."""
    if change := find_change([InputFile.fasta_of(index.attributes)], [fasta], sha256_of_file):
        raise SeqmillError(f"{index.path} was made from {change.before}, not from {change.now}; run again")


def _write_tables(output: Path, records: Path, verified: VerifiedSet, dtype: str) -> str:
    """Write embeddings.h5 and records.tsv.gz; return the SHA-256 of the values of `embeddings`."""
    with ThreadPoolExecutor(1) as thread:  # at the same time: the table keeps Python busy, the embeddings the disk
        unwanted = Event()
        table = thread.submit(write_records, records, verified.index, verified.fates, unwanted)
        try:
            digest = _write_embeddings(output, verified, dtype)
            table.result()
        finally:
            unwanted.set()  # if the embeddings failed, nobody waits for the table
    return digest


def _write_embeddings(path: Path, verified: VerifiedSet, dtype: str) -> str:
    index, kept, datasets = verified.index, verified.kept, list(verified.outputs)
    with new_hdf5(path) as file:
        write_attributes(file, _attributes(verified))
        file["lengths"] = index.record_lengths[kept]
        file["sequence_digests"] = index.sequence_digests[index.record_rows[kept]]
        file.write_strings("sequence_ids", kept, index.encoded_ids)
        for name in datasets:
            file.reserve(name, (len(kept), verified.hidden_dim), dtype)
        if verified.fingerprint.per_residue:
            reserve_residues(file, verified)
    blocks = gather_vectors(verified)
    digests = write_outputs(path, datasets, dtype, blocks, lambda row: index.record_name(int(kept[row])))
    if verified.fingerprint.per_residue:
        write_residues(path, verified)
    return digests["embeddings"]


def _attributes(verified: VerifiedSet) -> dict[str, Any]:
    """Return the attributes of embeddings.h5: no time and no host, so that equal results are equal files."""
    outputs = verified.outputs.items()
    return {
        "embeddings_format": EMBEDDINGS_FORMAT,
        "seqmill_version": __version__,
        **verified.fingerprint.attributes(),
        "num_layers": verified.shards[0].num_layers,
        "outputs": json.dumps([{"dataset": name, "layer": layer, "pooling": how} for name, (layer, how) in outputs]),
        "computed_by": "; ".join(verified.computed_by),
        "trained_weights": int(not verified.warning),  # R's rhdf5 reads the HDF5 type of a bool as NA
        "warning": verified.warning,
        **{name: verified.index.attributes[name] for name in INDEX_ATTRIBUTES},
        "num_invalid": verified.index.num_invalid,
        "fate_counts": json.dumps(verified.fate_counts),
        **verified.audit,
    }


def _log_result(verified: VerifiedSet, output: Path, records: Path) -> None:
    sizes = (len(verified.kept), verified.hidden_dim, len(verified.shards))
    log.info("%s: %d embeddings of %d dimensions from %d shards", output, *sizes)
    for source in verified.reused.summary():
        log.info("reused: %d sequences from %s", source["sequences"], source["path"])
    if len(kinds := verified.computed_by) > 1:
        log.warning("several kinds of device or kernel: another run may differ by rounding: %s", "; ".join(kinds))
    if invalid := verified.index.num_invalid:
        log.warning("%d RECORDS ARE INVALID and are not in %s; %s names them", invalid, output, records)
    if quarantined := verified.fate_counts["quarantined"]:
        message = "%d RECORDS ARE QUARANTINED: they have no finite embedding and are not in %s; %s names them"
        log.warning(message, quarantined, output, records)
    for shard, status in zip(verified.shards, verified.statuses, strict=True):
        if status.audit.verdict == "warn":
            log.warning("%s: its audit failed or found large errors: %s", shard.path, status.audit.worst)
    if verified.warning:
        log.warning(verified.warning)


def _remove_leftovers(verified: VerifiedSet) -> None:
    """Remove the files of killed workers, also those of other world sizes; name the parts and shards that remain."""
    shards = [shard.path for shard in verified.shards]
    folder, parts = shards[0].parent, parts_folder(shards[0])
    remove_free_locks(folder)
    for place in (folder, parts):
        remove_left(place)
    PartStore(parts, verified.index, verified.fingerprint).clear()
    _warn_about(list(parts.glob("*.part.h5")), "part files of runs with other settings")
    merged = {shard.name for shard in shards}
    others = [path for path in folder.glob("shard_*-of-*.h5") if path.name not in merged]
    _warn_about(others, "shards of another number of shards")
    with suppress(OSError):  # it is not empty
        parts.rmdir()


def _warn_about(left: list[Path], what: str) -> None:
    if left:
        size = size_in_words(sum(path.stat().st_size for path in left))
        log.warning("%s: %d %s remain, %s; remove them if no run will use them", left[0].parent, len(left), what, size)
