"""seqmill: FASTA files to biological language-model embeddings, packed, sharded and verified."""

from typing import TYPE_CHECKING, Any

from seqmill.errors import SeqmillError
from seqmill.version import __version__

if TYPE_CHECKING:
    from seqmill.neighbors import search
    from seqmill.store.embeddings import Embeddings, open_embeddings

__all__ = ["Embeddings", "SeqmillError", "__version__", "open_embeddings", "search"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import what reads embeddings when it is asked for, so that light modules load without NumPy and h5py."""
    if name in ("Embeddings", "open_embeddings"):
        from seqmill.store import embeddings

        return getattr(embeddings, name)
    if name == "search":
        from seqmill.neighbors import search

        return search
    raise AttributeError(f"module 'seqmill' has no attribute {name!r}")
