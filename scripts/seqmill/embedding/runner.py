"""The runner: it takes packs and yields their embeddings, in order."""

import logging
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from queue import Full, Queue
from typing import NamedTuple

import numpy as np
import torch

from seqmill.embedding.device import float32_sums
from seqmill.embedding.embedder import DoesNotFit, PackEmbedder
from seqmill.embedding.readout import Vectors
from seqmill.model.out_of_memory import unless_out_of_memory
from seqmill.model.pack import Pack, Windows
from seqmill.spec.packing import MAX_PACK_TOKENS
from seqmill.store.index import Index

# On a CPU a pack is computed in pieces of this many tokens. One thread computes a piece from its tokens to the pooled
# vectors: activations stay in the cache, threads never wait for each other, and the bits don't depend on the number of
# threads. docs/explanation/performance.md has the measurements.
CPU_PIECE_TOKENS = 2048
# A GPU gets a pack whole, unless it is longer than planned: a long contig in very many windows.
CUDA_PIECE_TOKENS = 2 * MAX_PACK_TOKENS

STAGED = 2  # pieces that wait on the device to be computed
IN_FLIGHT = 2  # pieces whose results are being copied while a later one is computed

log = logging.getLogger(__name__)

Arrays = tuple[np.ndarray, np.ndarray]  # `readout.Vectors` on the host


class Staged(NamedTuple):
    """A piece of a pack, and its copy on the device."""

    pack_number: int
    is_last: bool  # of the pack's pieces
    piece: Pack  # on the host
    copied: tuple[Pack, torch.cuda.Event] | None  # the event ends the copying; None without the memory for it


def embed_packs(
    embed: PackEmbedder, index: Index, packs: Iterable[int], device: torch.device, threads: int
) -> Generator[tuple[int, np.ndarray, np.ndarray], None, None]:
    """Yield each pack's number, embeddings and vectors of residues.

    Embeddings are float32 (sequences in the pack, outputs x hidden_dim); those of a sequence's segments are combined
    (`Readout.combine`). For the residues see `readout.Vectors`. A CPU computes `threads` pieces at a time.
    """
    results = _on_cpu(embed, index, packs, threads) if device.type == "cpu" else _on_cuda(embed, index, packs, device)
    with closing(results):
        for pack, (rows, residues) in results:
            yield pack, embed.readout.combine(rows, index.pack_segments(pack)), residues


def warm_up(embed: PackEmbedder, index: Index, pack: int, device: torch.device) -> None:
    """Compute the first piece of a pack on a GPU and drop the result, so that the kernels are loaded and compiled."""
    with float32_sums(), suppress(DoesNotFit):  # the lack of memory may pass
        _alone(embed, whole_pack(index, pack).split(CUDA_PIECE_TOKENS)[0], device)


def whole_pack(index: Index, pack: int) -> Pack:
    """Return a pack of the index on the CPU."""
    tokens, lengths = index.pack_tokens(pack), index.pack_lengths(pack)
    whole = Pack.from_tokens(tokens, lengths, index.first_segment(pack))
    begins = index.pack_windows(pack)
    return whole if begins is None else replace(whole, windows=Windows(begins, index.stride))


def _joined(pieces: list[Arrays]) -> Arrays:
    rows, residues = zip(*pieces, strict=True)
    return (rows[0], residues[0]) if len(pieces) == 1 else (np.concatenate(rows), np.concatenate(residues))


def _on_cpu(
    embed: PackEmbedder, index: Index, packs: Iterable[int], threads: int
) -> Generator[tuple[int, Arrays], None, None]:
    before = torch.get_num_threads()

    def embed_piece(piece: Pack) -> Arrays:
        rows, residues = embed(piece)
        return rows.numpy(), residues.numpy()

    def oldest() -> tuple[int, Arrays]:
        pack_number, pieces = waiting.popleft()
        return pack_number, _joined([piece.result() for piece in pieces])

    waiting: deque[tuple[int, list[Future[Arrays]]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        torch.set_num_threads(1)  # pieces run in parallel; inside a piece nothing does
        for pack_number in packs:
            pack = whole_pack(index, pack_number)
            waiting.append((pack_number, [pool.submit(embed_piece, piece) for piece in pack.split(CPU_PIECE_TOKENS)]))
            while len(waiting) > 1 and sum(len(pieces) for _, pieces in waiting) > 2 * threads:
                yield oldest()
        while waiting:
            yield oldest()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a failure need not wait for the pieces that are running
        torch.set_num_threads(before)


def _on_cuda(
    embed: PackEmbedder, index: Index, packs: Iterable[int], device: torch.device
) -> Generator[tuple[int, Arrays], None, None]:
    """Compute so that the device never waits for the host: pieces are staged ahead, results are fetched behind.

    Results are copied to the host on a stream of their own. The host waits for a result when IN_FLIGHT later pieces are
    queued on the device. Without the memory for that, a piece is computed alone.
    """
    to_host, compute = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    in_flight: deque[tuple[int, bool, Vectors, torch.cuda.Event]] = deque()
    fetched: list[Arrays] = []
    alone = 0

    def start(pack: Pack, copied: torch.cuda.Event) -> tuple[Vectors, torch.cuda.Event]:
        compute.wait_event(copied)
        for tensor in (pack.tokens, pack.cu_seqlens):
            tensor.record_stream(compute)  # made on another stream: not to be reused before this one is done
        vectors = embed(pack)
        computed = compute.record_event()
        with torch.cuda.stream(to_host):
            to_host.wait_event(computed)
            on_host = Vectors(*map(_to_host, vectors))
            return on_host, to_host.record_event(torch.cuda.Event(blocking=True))

    def fetch_oldest() -> Iterator[tuple[int, Arrays]]:
        pack_number, is_last, vectors, arrived = in_flight.popleft()
        arrived.synchronize()
        # Copied, so that the pinned memory is soon free for the next piece.
        yield from finish(pack_number, is_last, (vectors.rows.numpy().copy(), vectors.residues.numpy().copy()))

    def finish(pack_number: int, is_last: bool, arrays: Arrays) -> Iterator[tuple[int, Arrays]]:
        fetched.append(arrays)
        if is_last:
            yield pack_number, _joined(fetched)
            fetched.clear()

    # Closed at an error, so that the thread ends.
    with float32_sums(), closing(_staged(index, packs, device)) as staged:
        for pack_number, is_last, piece, copied in staged:
            started = unless_out_of_memory(start, *copied) if copied else None
            if started:
                in_flight.append((pack_number, is_last, *started))
            while len(in_flight) > (IN_FLIGHT if started else 0):
                yield from fetch_oldest()
            if not started:
                alone += 1
                if alone == 1:
                    log.warning("not enough memory on %s for several pieces at a time: some are computed alone", device)
                yield from finish(pack_number, is_last, _alone(embed, piece, device))
        while in_flight:
            yield from fetch_oldest()


def _alone(embed: PackEmbedder, piece: Pack, device: torch.device) -> Arrays:
    """Compute a piece from host to host without pinned memory, in halves if there is not enough memory for it.

    Raise DoesNotFit if there is not enough for one sequence.
    """
    torch.cuda.empty_cache()  # for cuBLAS and Triton, which allocate on their own
    if computed := unless_out_of_memory(_through_pageable_memory, embed, piece, device):
        return computed
    halves = piece.split(len(piece.tokens) // 2)
    if len(halves) == 1:
        raise DoesNotFit(piece)
    return _joined([_alone(embed, half, device) for half in halves])


def _through_pageable_memory(embed: PackEmbedder, piece: Pack, device: torch.device) -> Arrays:
    rows, residues = embed(_on_device(piece, device, pinned=False))
    torch.cuda.current_stream(device).record_event(torch.cuda.Event(blocking=True)).synchronize()
    return rows.cpu().numpy(), residues.cpu().numpy()


def _staged(index: Index, packs: Iterable[int], device: torch.device) -> Generator[Staged, None, None]:
    """Yield pieces of packs on a GPU. A thread copies them there on a stream of its own, up to STAGED pieces ahead."""
    to_device = torch.cuda.Stream(device)
    staged: Queue[Staged | BaseException | None] = Queue(STAGED)
    stopped = threading.Event()

    def put(item: Staged | BaseException | None) -> None:
        while not stopped.is_set():
            with suppress(Full):
                staged.put(item, timeout=0.1)
                return

    def copy(piece: Pack) -> tuple[Pack, torch.cuda.Event]:
        with torch.cuda.stream(to_device):
            return _on_device(piece, device, pinned=True), to_device.record_event()

    def stage() -> None:
        try:
            for pack_number in packs:
                pieces = whole_pack(index, pack_number).split(CUDA_PIECE_TOKENS)
                for number, piece in enumerate(pieces, start=1):
                    if stopped.is_set():
                        return
                    copied = unless_out_of_memory(copy, piece)
                    put(Staged(pack_number, number == len(pieces), piece, copied))
            put(None)
        except BaseException as error:  # to be raised where the pieces are awaited
            put(error)

    stager = threading.Thread(target=stage, name="stager", daemon=True)
    stager.start()
    try:
        while (item := staged.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        stager.join()


def _to_host(values: torch.Tensor) -> torch.Tensor:
    """Copy to pinned memory on the current stream, without waiting."""
    if not values.is_cuda:  # residues that are not kept
        return values
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    pinned.copy_(values, non_blocking=True)
    values.record_stream(torch.cuda.current_stream(values.device))
    return pinned


def _on_device(piece: Pack, device: torch.device, pinned: bool) -> Pack:
    """Copy on the current stream, through pinned memory without waiting."""
    tokens, cu_seqlens = (_to_device(values, device, pinned) for values in (piece.tokens, piece.cu_seqlens))
    return replace(piece, tokens=tokens, cu_seqlens=cu_seqlens)


def _to_device(values: torch.Tensor, device: torch.device, pinned: bool) -> torch.Tensor:
    dtype = torch.int32 if values.dtype == torch.uint16 else values.dtype  # CUDA hardly knows uint16
    on_host = torch.empty(values.shape, dtype=dtype, pin_memory=pinned)
    on_host.copy_(values)
    return on_host.to(device, non_blocking=pinned)
