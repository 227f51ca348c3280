"""An embeddings file in the formats of other programs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from seqmill.base.files import refuse_folder, refuse_shared
from seqmill.errors import SeqmillError
from seqmill.export.entries import write_h5, write_pt
from seqmill.export.formats import BESIDE, FORMATS
from seqmill.export.output_files import require_room
from seqmill.export.tables import write_faiss, write_h5ad, write_npy, write_parquet
from seqmill.store.embeddings import Embeddings, open_embeddings

# Each takes the records.tsv.gz as well, or None; only pt, whose entries hold descriptions, reads it.
WRITERS: dict[str, Callable[[Embeddings, Path, Path | None], None]] = {
    "parquet": write_parquet,
    "npy": write_npy,
    "h5ad": write_h5ad,
    "h5": write_h5,
    "h5_residues": partial(write_h5, per_residue=True),
    "faiss": write_faiss,
    "pt": write_pt,
}

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
        output: the file to write; of `pt` the folder to make. What lies beside it: docs/exports.md.
        format_name: one of `FORMATS`.
        records: of `pt`, the records.tsv.gz with the descriptions.
        layer, pooling: which output, as for `open_embeddings`; the first that fits.

    Raises:
        SeqmillError: a package is missing, the source is damaged or has no such output, there is too little room.
    """
    if format_name not in WRITERS:
        raise SeqmillError(f"no format is called {format_name!r}; there are {', '.join(FORMATS)}")
    source, output = Path(source), Path(output)
    embeddings = open_embeddings(source, layer, pooling)
    beside = [output.with_name(output.name + BESIDE[format_name])] if format_name in BESIDE else []
    refuse_shared([output, *beside], filter(None, (source, records)))
    if format_name != "pt":
        for path in (output, *beside):
            refuse_folder(path)
    if format_name == "h5_residues" and not embeddings.has_residues:
        raise SeqmillError(f"{source}: has no vectors of residues; make it with per_residue: float16")
    output.parent.mkdir(parents=True, exist_ok=True)
    require_room(output.parent, embeddings, format_name)
    WRITERS[format_name](embeddings, output, records)
    rows, width = embeddings.array.shape
    what = f"layer {embeddings.layer}" + (f", {embeddings.pooling}" if format_name != "h5_residues" else "")
    log.info("%s: %d embeddings of %d dimensions (%s) as %s", output, rows, width, what, format_name)
    others = [f"{layer} {pooling}" for layer, pooling in embeddings.outputs]
    if len(others) > 1 and layer is None and pooling is None:
        log.info("%s has several outputs (%s): --layer and --pooling choose another", source, ", ".join(others))
    if embeddings.attrs.get("warning"):
        log.warning(embeddings.attrs["warning"])
