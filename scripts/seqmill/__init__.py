"""seqmill: embeddings of proteins and nucleotides by language models, fast and verified.

    model = seqmill.load("esm2_t33_650M_UR50D")
    vectors = model.embed(["MKTAYIAKQR", "MAVLPQ"])  # NumPy, (2, 1280)

    embeddings = seqmill.open_embeddings("results/proteins/esm2_t33_650M_UR50D/embeddings.h5")
    embeddings["sp|P12345|NAME"]  # NumPy, (1280,)

Results can be read without torch; embedding needs `pip install 'seqmill[embed]'`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from seqmill.base.extras import optional_packages
from seqmill.errors import SeqmillError
from seqmill.version import __version__

if TYPE_CHECKING:
    from seqmill.api.embedder import Embedder
    from seqmill.api.embeddings import Embeddings, open_embeddings
    from seqmill.api.load import embed, load
    from seqmill.neighbors import search

__all__ = ["Embedder", "Embeddings", "SeqmillError", "__version__", "embed", "load", "open_embeddings", "search"]

# Imported when they are asked for: reading needs no torch, and `import seqmill` not even NumPy.
_MODULES = {
    "Embedder": "seqmill.api.embedder",
    "Embeddings": "seqmill.api.embeddings",
    "embed": "seqmill.api.load",
    "load": "seqmill.api.load",
    "open_embeddings": "seqmill.api.embeddings",
    "search": "seqmill.neighbors",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _MODULES:
        raise AttributeError(f"module 'seqmill' has no attribute {name!r}")
    try:
        with optional_packages():
            return getattr(import_module(_MODULES[name]), name)
    except SeqmillError as error:  # help() and hasattr() expect no other
        raise AttributeError(f"{name}: {error}") from None


def __dir__() -> list[str]:
    return __all__
