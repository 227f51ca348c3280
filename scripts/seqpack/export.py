"""An embeddings file in the formats of other programs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from seqpack.embeddings import Embeddings, open_embeddings
from seqpack.errors import SeqpackError
from seqpack.export_entries import names_path, write_h5, write_pt
from seqpack.export_tables import ids_path, write_faiss, write_h5ad, write_npy, write_parquet
from seqpack.files import refuse_to_replace, require_space

WRITERS: dict[str, Callable[[Embeddings, Path], None]] = {
    "parquet": write_parquet,
    "npy": write_npy,
    "h5ad": write_h5ad,
    "h5": write_h5,
    "h5_residues": partial(write_h5, per_residue=True),
    "faiss": write_faiss,
    "pt": write_pt,
}

log = logging.getLogger(__name__)


def export_embeddings(source: str | Path, output: str | Path, format_name: str, records: Path | None = None) -> None:
    """Write an embeddings file in another format, in blocks of bounded size.

    Args:
        source: the embeddings.h5.
        output: the file to write; of `pt` the folder to make. What lies beside it: docs/exports.md.
        format_name: one of `WRITERS`.
        records: of `pt`, the records.tsv.gz with the descriptions.

    Raises:
        SeqpackError: a package is missing, the source is damaged, there is too little room.
    """
    if format_name not in WRITERS:
        raise SeqpackError(f"no format is called {format_name!r}; there are {', '.join(WRITERS)}")
    source, output = Path(source), Path(output)
    embeddings = open_embeddings(source)
    for path in (output, ids_path(output), names_path(output)):
        for read in (source, records):
            if read:
                refuse_to_replace(read, path)
    output.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = embeddings.array.nbytes
    if format_name == "h5_residues" and not embeddings.has_residues:
        raise SeqpackError(f"{source}: has no vectors of residues; make it with per_residue: float16")
    if embeddings.has_residues and format_name in ("h5_residues", "pt"):
        as_float32 = 2 if format_name == "pt" and embeddings.attrs["per_residue"] == "float16" else 1
        num_bytes += as_float32 * embeddings.residue_bytes
    require_space(output.parent, num_bytes, f"{len(embeddings)} embeddings as {format_name}")
    if format_name == "pt":
        write_pt(embeddings, output, records)
    else:
        WRITERS[format_name](embeddings, output)
    log.info("%s: %d embeddings of %d dimensions as %s", output, *embeddings.array.shape, format_name)
    if embeddings.attrs.get("warning"):
        log.warning(embeddings.attrs["warning"])
