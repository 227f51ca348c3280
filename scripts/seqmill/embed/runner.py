"""The runner: packs in, embeddings out, in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from queue import Full, Queue

import numpy as np
import torch

from seqmill.embed.embedder import PackEmbedder
from seqmill.embed.readout import Vectors
from seqmill.model.pack import Pack, Windows
from seqmill.spec.packing import MAX_PACK_TOKENS
from seqmill.store.index import Index

# On a CPU a pack is computed in pieces of this many tokens, each by one thread from the embedding to the
# pooled vectors: the activations of a piece stay in the cache, threads never wait for one another, and the
# bits don't depend on how many there are. docs/performance.md has the measurements.
CPU_PIECE_TOKENS = 2048

# A pack goes to a GPU whole, but for one longer than planned: a long contig in very many windows.
CUDA_PIECE_TOKENS = 2 * MAX_PACK_TOKENS

# Rows and residues of `readout.Vectors`, on the host.
Arrays = tuple[np.ndarray, np.ndarray]

STAGED = 2  # pieces that wait on the device to be computed
IN_FLIGHT = 2  # pieces whose results are on their way while a later one is computed


def embed_packs(
    embed: PackEmbedder, index: Index, packs: Iterable[int], device: torch.device, threads: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield each pack's number, embeddings and vectors of residues in turn.

    Embeddings are float32 (sequences in the pack, outputs x hidden_dim), that of a sequence of several segments
    combined of theirs, see `Readout.combine`; for the residues see `readout.Vectors`.

    Args:
        embed: holds the model, on the device.
        index: holds the tokens.
        packs: the packs' numbers.
        device: cpu or cuda.
        threads: how many pieces are computed at a time on a CPU.
    """
    results = _on_cpu(embed, index, packs, threads) if device.type == "cpu" else _on_cuda(embed, index, packs, device)
    with closing(results):
        for pack, (rows, residues) in results:
            yield pack, embed.readout.combine(rows, index.pack_segments(pack)), residues


def warm_up(embed: PackEmbedder, index: Index, pack: int, device: torch.device) -> None:
    """Compute the first piece of a pack on a GPU for nothing, so that its kernels are loaded and compiled."""
    piece = whole_pack(index, pack).split(CUDA_PIECE_TOKENS)[0]
    tokens, cu_seqlens = _to_device(piece.tokens, device), _to_device(piece.cu_seqlens, device)
    for values in embed(replace(piece, tokens=tokens, cu_seqlens=cu_seqlens)):
        _to_host(values)
    torch.cuda.synchronize(device)


def whole_pack(index: Index, pack: int) -> Pack:
    """Return a pack of the index on the CPU."""
    tokens, lengths = index.pack_tokens(pack), index.pack_lengths(pack)
    whole = Pack.from_tokens(tokens, lengths, index.first_segment(pack))
    begins = index.pack_windows(pack)
    return whole if begins is None else replace(whole, windows=Windows(begins, index.stride))


def _joined(pieces: list[Arrays]) -> Arrays:
    rows, residues = zip(*pieces, strict=True)
    return (rows[0], residues[0]) if len(pieces) == 1 else (np.concatenate(rows), np.concatenate(residues))


def _on_cpu(embed: PackEmbedder, index: Index, packs: Iterable[int], threads: int) -> Iterator[tuple[int, Arrays]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a piece is the unit of parallel work; inside it there is none

    def embed_piece(piece: Pack) -> Arrays:
        rows, residues = embed(piece)
        return rows.numpy(), residues.numpy()

    def oldest() -> tuple[int, Arrays]:
        pack_number, pieces = waiting.popleft()
        return pack_number, _joined([piece.result() for piece in pieces])

    waiting: deque[tuple[int, list[Future[Arrays]]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for pack_number in packs:
            pack = whole_pack(index, pack_number)
            waiting.append((pack_number, [pool.submit(embed_piece, piece) for piece in pack.split(CPU_PIECE_TOKENS)]))
            while len(waiting) > 1 and sum(len(pieces) for _, pieces in waiting) > 2 * threads:
                yield oldest()
        while waiting:
            yield oldest()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a failure is told before the pieces under way are done
        torch.set_num_threads(before)


def _on_cuda(
    embed: PackEmbedder, index: Index, packs: Iterable[int], device: torch.device
) -> Iterator[tuple[int, Arrays]]:
    """Compute never waits for the host: pieces of packs are staged ahead, results are fetched behind.

    A thread reads packs, fills pinned memory and copies it on a stream of its own, up to STAGED pieces
    ahead; pooled results go back on a third stream, and are waited for when IN_FLIGHT later pieces are
    queued on the device.
    """
    to_device, to_host = torch.cuda.Stream(device), torch.cuda.Stream(device)
    compute = torch.cuda.current_stream(device)
    staged: Queue[tuple[int, bool, Pack, torch.cuda.Event] | BaseException | None] = Queue(STAGED)
    stopped = threading.Event()

    def put(item: tuple[int, bool, Pack, torch.cuda.Event] | BaseException | None) -> None:
        while not stopped.is_set():
            with suppress(Full):
                staged.put(item, timeout=0.1)
                return

    def stage() -> None:
        try:
            for pack_number in packs:
                pieces = whole_pack(index, pack_number).split(CUDA_PIECE_TOKENS)
                for number, piece in enumerate(pieces, start=1):
                    if stopped.is_set():
                        return
                    with torch.cuda.stream(to_device):
                        tokens, cu_seqlens = _to_device(piece.tokens, device), _to_device(piece.cu_seqlens, device)
                        arrived = to_device.record_event()
                    staged_piece = replace(piece, tokens=tokens, cu_seqlens=cu_seqlens)
                    put((pack_number, number == len(pieces), staged_piece, arrived))
            put(None)
        except BaseException as error:  # to be raised where the results are awaited
            put(error)

    def fetch_oldest() -> Iterator[tuple[int, Arrays]]:
        pack_number, is_last, vectors, arrived = in_flight.popleft()
        arrived.synchronize()
        # Copied, so that pinned memory is soon free for the next piece.
        fetched.append((vectors.rows.numpy().copy(), vectors.residues.numpy().copy()))
        if is_last:
            yield pack_number, _joined(fetched)
            fetched.clear()

    in_flight: deque[tuple[int, bool, Vectors, torch.cuda.Event]] = deque()
    fetched: list[Arrays] = []
    stager = threading.Thread(target=stage, name="stager", daemon=True)
    stager.start()
    try:
        while (item := staged.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            pack_number, is_last, pack, arrived = item
            compute.wait_event(arrived)
            for tensor in (pack.tokens, pack.cu_seqlens):
                tensor.record_stream(compute)  # made on another stream: not to be reused before this one is done
            vectors = embed(pack)
            computed = compute.record_event()
            with torch.cuda.stream(to_host):
                to_host.wait_event(computed)
                on_host = Vectors(*map(_to_host, vectors))
                in_flight.append((pack_number, is_last, on_host, to_host.record_event()))
            if len(in_flight) > IN_FLIGHT:
                yield from fetch_oldest()
        while in_flight:
            yield from fetch_oldest()
    finally:
        stopped.set()
        stager.join()


def _to_host(values: torch.Tensor) -> torch.Tensor:
    """Copy to pinned memory on the current stream, without waiting."""
    if not values.is_cuda:  # residues, where none are kept
        return values
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    pinned.copy_(values, non_blocking=True)
    values.record_stream(torch.cuda.current_stream(values.device))
    return pinned


def _to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy through pinned memory on the current stream, without waiting; uint16, little known to CUDA, as int32."""
    dtype = torch.int32 if values.dtype == torch.uint16 else values.dtype
    pinned = torch.empty(values.shape, dtype=dtype, pin_memory=True)
    pinned.copy_(values)
    return pinned.to(device, non_blocking=True)
