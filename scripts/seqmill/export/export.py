"""Writes an embeddings file in the formats of other programs."""

import logging
import os
from pathlib import Path

from seqmill.base.extras import optional_packages
from seqmill.base.files import refuse_folder, refuse_shared, require_space
from seqmill.errors import SeqmillError
from seqmill.export.formats import FORMATS
from seqmill.store.embeddings import EmbeddingsFile

log = logging.getLogger(__name__)


def export_embeddings(
    source: str | Path,
    output: str | Path,
    format_name: str,
    records: Path | None = None,
    layer: int | None = None,
    pooling: str | None = None,
) -> None:
    """Write an output of an embeddings file in another format, in blocks of bounded size.

    Args:
        source: the embeddings.h5.
        output: the file to write; for `pt` the folder to make. docs/how-to/exports.md lists the files next to it.
        format_name: one of `FORMATS`.
        records: for `pt`, the records.tsv.gz with the descriptions.
        layer, pooling: which output, as in `open_embeddings`; the first that fits.

    Raises:
        SeqmillError: a package is missing, the source is damaged or has no such output, or the disk is too full.
    """
    if format_name not in FORMATS:
        raise SeqmillError(f"no format is called {format_name!r}; the formats are {', '.join(FORMATS)}")
    source, output, form = Path(source), Path(output), FORMATS[format_name]
    embeddings = EmbeddingsFile(source, layer, pooling)
    outputs = [output, *([output.with_name(output.name + form.beside)] if form.beside else [])]
    refuse_shared(outputs, filter(None, (source, records)))
    for path in [] if form.is_folder else outputs:
        refuse_folder(path)
    if form.per_residue and not embeddings.has_residues:
        raise SeqmillError(f"{source}: has no vectors of residues; make it with per_residue: float16")
    output.parent.mkdir(parents=True, exist_ok=True)
    _require_room(output.parent, embeddings, format_name)
    with optional_packages():
        form.write(embeddings, output, records)
    rows, width = embeddings.array.shape
    what = f"layer {embeddings.layer}" + ("" if form.per_residue else f", {embeddings.pooling}")
    log.info("%s: %d embeddings of %d dimensions (%s) as %s", output, rows, width, what, format_name)
    if len(embeddings.outputs) > 1 and layer is None and pooling is None:
        others = ", ".join(f"{layer} {pooling}" for layer, pooling in embeddings.outputs)
        log.info("%s has several outputs (%s): --layer and --pooling choose another", source, others)
    if embeddings.attrs.get("warning"):
        log.warning(embeddings.attrs["warning"])


def _require_room(folder: Path, embeddings: EmbeddingsFile, format_name: str) -> None:
    """Raise a SeqmillError if the disk of `folder` has too few bytes or files left for an export."""
    form, what = FORMATS[format_name], f"{len(embeddings)} embeddings as {format_name}"
    require_space(folder, form.bytes_needed(embeddings), what)
    disk = os.statvfs(folder)
    # Some file systems, such as Btrfs, do not count files: f_files is 0.
    if form.is_folder and disk.f_files and disk.f_favail < len(embeddings) + 2:
        raise SeqmillError(
            f"{folder}: {what} are as many files, but the disk has room for only {disk.f_favail:,}; "
            "use another disk, or the format h5, which is one file"
        )
