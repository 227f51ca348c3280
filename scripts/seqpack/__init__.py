"""seqpack: FASTA files to biological language-model embeddings, packed, sharded and verified."""

from typing import TYPE_CHECKING, Any

from seqpack.errors import SeqpackError

if TYPE_CHECKING:
    from seqpack.embeddings import Embeddings, open_embeddings
    from seqpack.neighbors import search

__version__ = "0.1.0"
__all__ = ["Embeddings", "SeqpackError", "__version__", "open_embeddings", "search"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import what reads embeddings when it is asked for, so that light modules load without NumPy and h5py."""
    if name in ("Embeddings", "open_embeddings"):
        from seqpack import embeddings

        return getattr(embeddings, name)
    if name == "search":
        from seqpack.neighbors import search

        return search
    raise AttributeError(f"module 'seqpack' has no attribute {name!r}")
