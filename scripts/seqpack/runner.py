"""The runner: packs in, pooled embeddings out, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from seqpack.errors import SeqpackError
from seqpack.index import Index
from seqpack.models.esm2 import ESM2
from seqpack.packs import Pack
from seqpack.pooling import mean_over_residues

# On a CPU a pack is computed in pieces of this many tokens, each by one thread from the embedding to the
# pooled vectors: the activations of a piece stay in the cache, threads never wait for one another, and the
# bits don't depend on how many there are. docs/performance.md has the measurements.
CPU_PIECE_TOKENS = 2048


def embed_packs(
    model: ESM2, index: Index, packs: Iterable[int], device: torch.device, threads: int
) -> Iterator[np.ndarray]:
    """Yield each pack's embeddings in turn: float32 (sequences in the pack, hidden_dim).

    Args:
        model: on the device.
        index: holds the tokens.
        packs: the packs' numbers.
        device: cpu or cuda.
        threads: how many pieces are computed at a time on a CPU.

    Raises:
        SeqpackError: an embedding is not finite; names the sequence.
    """
    results = _on_cpu(model, index, packs, threads) if device.type == "cpu" else _on_cuda(model, index, packs, device)
    for pack_number, embeddings in results:
        _require_finite(index, pack_number, embeddings)
        yield embeddings


def _on_cpu(model: ESM2, index: Index, packs: Iterable[int], threads: int) -> Iterator[tuple[int, np.ndarray]]:
    torch.set_num_threads(1)  # a piece is the unit of parallel work; inside it there is none

    def embed(piece: Pack) -> np.ndarray:
        return mean_over_residues(model(piece), piece).to(torch.float32).numpy()

    def oldest() -> tuple[int, np.ndarray]:
        pack_number, pieces = waiting.popleft()
        return pack_number, np.concatenate([piece.result() for piece in pieces])

    waiting: deque[tuple[int, list[Future[np.ndarray]]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for pack_number in packs:
            pack = _load(index, pack_number, torch.device("cpu"))
            waiting.append((pack_number, [pool.submit(embed, piece) for piece in pack.split(CPU_PIECE_TOKENS)]))
            while sum(len(pieces) for _, pieces in waiting) > 2 * threads:
                yield oldest()
        while waiting:
            yield oldest()
    finally:
        pool.shutdown(cancel_futures=True)


def _on_cuda(model: ESM2, index: Index, packs: Iterable[int], device: torch.device) -> Iterator[tuple[int, np.ndarray]]:
    for pack_number in packs:
        pack = _load(index, pack_number, device)
        yield pack_number, mean_over_residues(model(pack), pack).to("cpu", torch.float32).numpy()


def _load(index: Index, pack_number: int, device: torch.device) -> Pack:
    return Pack.from_tokens(index.pack_tokens(pack_number), index.pack_lengths(pack_number), device)


def _require_finite(index: Index, pack_number: int, embeddings: np.ndarray) -> None:
    finite = np.isfinite(embeddings).all(axis=1)
    if not finite.all():
        row = int(index.pack_offsets[pack_number]) + int(np.flatnonzero(~finite)[0])
        raise SeqpackError(
            f"the embedding of {index.sequence_id(row)!r} (record {int(index.sequence_records[row]) + 1}) "
            f"is not finite; {int((~finite).sum())} such in pack {pack_number}; check the weights"
        )
