"""The runner: packs in, mean embeddings out, in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from queue import Full, Queue

import numpy as np
import torch

from seqpack.index import Index
from seqpack.memory import PackEmbedder
from seqpack.packs import Pack, boundaries

# On a CPU a pack is computed in pieces of this many tokens, each by one thread from the embedding to the
# pooled vectors: the activations of a piece stay in the cache, threads never wait for one another, and the
# bits don't depend on how many there are. docs/performance.md has the measurements.
CPU_PIECE_TOKENS = 2048

STAGED = 2  # packs that wait on the device to be computed
IN_FLIGHT = 2  # packs whose results are on their way while a later one is computed


def embed_packs(
    embed: PackEmbedder, index: Index, packs: Iterable[int], device: torch.device, threads: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each pack's number and embeddings in turn: float32 (sequences in the pack, hidden_dim).

    Args:
        embed: holds the model, on the device.
        index: holds the tokens.
        packs: the packs' numbers.
        device: cpu or cuda.
        threads: how many pieces are computed at a time on a CPU.
    """
    results = _on_cpu(embed, index, packs, threads) if device.type == "cpu" else _on_cuda(embed, index, packs, device)
    with closing(results):
        yield from results


def _on_cpu(embed: PackEmbedder, index: Index, packs: Iterable[int], threads: int) -> Iterator[tuple[int, np.ndarray]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a piece is the unit of parallel work; inside it there is none

    def embed_piece(piece: Pack) -> np.ndarray:
        return embed(piece).numpy()

    def oldest() -> tuple[int, np.ndarray]:
        pack_number, pieces = waiting.popleft()
        return pack_number, np.concatenate([piece.result() for piece in pieces])

    waiting: deque[tuple[int, list[Future[np.ndarray]]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for pack_number in packs:
            first_row = int(index.pack_offsets[pack_number])
            pack = Pack.from_tokens(index.pack_tokens(pack_number), index.pack_lengths(pack_number), first_row)
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
) -> Iterator[tuple[int, np.ndarray]]:
    """Compute never waits for the host: packs are staged ahead, results are fetched behind.

    A thread reads packs, fills pinned memory and copies it on a stream of its own, up to STAGED packs
    ahead; pooled results go back on a third stream, and are waited for when IN_FLIGHT later packs are
    queued on the device.
    """
    to_device, to_host = torch.cuda.Stream(device), torch.cuda.Stream(device)
    compute = torch.cuda.current_stream(device)
    staged: Queue[tuple[int, Pack, torch.cuda.Event] | BaseException | None] = Queue(STAGED)
    stopped = threading.Event()

    def put(item: tuple[int, Pack, torch.cuda.Event] | BaseException | None) -> None:
        while not stopped.is_set():
            with suppress(Full):
                staged.put(item, timeout=0.1)
                return

    def stage() -> None:
        try:
            for pack_number in packs:
                if stopped.is_set():
                    return
                lengths = index.pack_lengths(pack_number)
                with torch.cuda.stream(to_device):
                    tokens = _to_device(index.pack_tokens(pack_number), device)
                    cu_seqlens = _to_device(boundaries(lengths), device)
                    arrived = to_device.record_event()
                put((pack_number, Pack(tokens, cu_seqlens, lengths, int(index.pack_offsets[pack_number])), arrived))
            put(None)
        except BaseException as error:  # to be raised where the results are awaited
            put(error)

    def oldest() -> tuple[int, np.ndarray]:
        pack_number, embeddings, arrived = in_flight.popleft()
        arrived.synchronize()
        return pack_number, embeddings.numpy().copy()  # so that pinned memory is soon free for the next pack

    in_flight: deque[tuple[int, torch.Tensor, torch.cuda.Event]] = deque()
    stager = threading.Thread(target=stage, name="stager", daemon=True)
    stager.start()
    try:
        while (item := staged.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            pack_number, pack, arrived = item
            compute.wait_event(arrived)
            for tensor in (pack.tokens, pack.cu_seqlens):
                tensor.record_stream(compute)  # made on another stream: not to be reused before this one is done
            pooled = embed(pack)
            computed = compute.record_event()
            with torch.cuda.stream(to_host):
                to_host.wait_event(computed)
                embeddings = torch.empty(pooled.shape, dtype=torch.float32, pin_memory=True)
                embeddings.copy_(pooled, non_blocking=True)
                pooled.record_stream(to_host)
                in_flight.append((pack_number, embeddings, to_host.record_event()))
            if len(in_flight) > IN_FLIGHT:
                yield oldest()
        while in_flight:
            yield oldest()
    finally:
        stopped.set()
        stager.join()


def _to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy through pinned memory on the current stream, without waiting."""
    pinned = torch.empty(values.shape, dtype=getattr(torch, values.dtype.name), pin_memory=True)
    pinned.numpy()[:] = values
    return pinned.to(device, non_blocking=True)
