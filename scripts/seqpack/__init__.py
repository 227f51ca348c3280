"""seqpack: FASTA files to biological language-model embeddings, packed, sharded and verified."""

from seqpack.embeddings import Embeddings, open_embeddings
from seqpack.errors import SeqpackError

__version__ = "0.1.0"
__all__ = ["Embeddings", "SeqpackError", "__version__", "open_embeddings"]
