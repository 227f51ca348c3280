"""The runner: packs in, pooled embeddings out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from seqpack.errors import SeqpackError
from seqpack.index import Index
from seqpack.models.esm2 import ESM2
from seqpack.packs import Pack
from seqpack.pooling import mean_over_residues


def embed_packs(model: ESM2, index: Index, packs: Iterable[int], device: torch.device) -> Iterator[np.ndarray]:
    """Yield each pack's embeddings in turn: float32 (sequences in the pack, hidden_dim).

    Raises:
        SeqpackError: an embedding is not finite; names the sequence.
    """
    for pack_number in packs:
        pack = Pack.from_tokens(index.pack_tokens(pack_number), index.pack_lengths(pack_number), device)
        embeddings = mean_over_residues(model(pack), pack).to("cpu", torch.float32).numpy()
        finite = np.isfinite(embeddings).all(axis=1)
        if not finite.all():
            row = int(index.pack_offsets[pack_number]) + int(np.flatnonzero(~finite)[0])
            raise SeqpackError(
                f"the embedding of {index.sequence_id(row)!r} (record {int(index.sequence_records[row]) + 1}) "
                f"is not finite; {int((~finite).sum())} such in pack {pack_number}; check the weights"
            )
        yield embeddings
