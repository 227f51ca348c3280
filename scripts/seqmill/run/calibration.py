"""How fast this device is: packs from all over an index, computed for a few seconds as a worker would."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
import torch

from seqmill.base.machine import available_memory
from seqmill.base.words import size_in_words, time_in_words
from seqmill.embed import device as devices
from seqmill.embed.embedder import PackEmbedder, is_out_of_memory
from seqmill.embed.readout import Readout
from seqmill.embed.runner import CPU_PIECE_TOKENS, CUDA_PIECE_TOKENS, embed_packs, warm_up
from seqmill.errors import SeqmillError
from seqmill.model.encoder import Encoder, make_encoder
from seqmill.model.pack import Pack
from seqmill.model.weights import load_weights
from seqmill.run.forecast import Shares, line
from seqmill.spec.models import UNTRAINED_PREFIX, ModelSource, find_model, model_flop
from seqmill.spec.task import AUTO, ComputeSettings
from seqmill.store.index import Index

PROBE_TOKENS = 256  # of the sequence that is timed first, to know what the others may take
FEWEST_TOKENS = 128  # in a piece of a pack, on a slow CPU
MOST_SAMPLES = 512


@dataclass(frozen=True)
class Calibration:
    """What a few packs have shown of this device.

    Attributes:
        device, precision, attention: in words.
        weights: in words, that untrained ones stood in for those of the model; else empty.
        packs, tokens: how much was computed; 0 if all sequences are too long for the time.
        seconds: wall time of that.
        flops_per_second: of all threads or of the GPU; see `seqmill.spec.models.model_flop`.
        threads: pieces that are computed at a time; 1 on a GPU.
        load_seconds: to make the model.
        peak: `seqmill.embed.device.peak_memory`, in bytes.
        splits: pieces that did not fit the device's memory.
    """

    device: str
    precision: str
    attention: str
    weights: str
    packs: int
    tokens: int
    seconds: float
    flops_per_second: float
    threads: int
    load_seconds: float
    peak: dict[str, int]
    splits: int

    def shard_seconds(self, shares: Shares) -> np.ndarray:
        """Return the expected seconds of computing each shard, float64 (world_size,).

        Not less than its longest segment takes, which one thread of a CPU computes.
        """
        rate = self.flops_per_second
        return np.maximum(shares.flop / rate, shares.longest_flop * self.threads / rate)


def calibrate(index: Index, source: ModelSource, settings: ComputeSettings, seconds: float) -> Calibration:
    """Compute packs from all over the index for about so many seconds, as a worker would; their results are dropped.

    Weights of a known model that are not there yet are stood in for by untrained ones, which take as long.

    Raises:
        SeqmillError: a device, precision or kernel that can't be had, unreadable weights, too little memory.
    """
    device = devices.choose_device(settings.device)
    precision = devices.choose_precision(settings.precision, device)
    threads = 1 if device.type == "cuda" else settings.threads or torch.get_num_threads()
    began, own = time.perf_counter(), source
    if source.kind == "released" and not all(file.exists() for file in source.files):
        source = find_model(UNTRAINED_PREFIX + source.name)
    make = partial(_make_model, index, source, getattr(torch, precision))
    model = make(device, settings.attention)
    attention = model.attention
    readout = Readout(source.family, settings.outputs.of(model.architecture.num_layers))
    embed = PackEmbedder(model, readout, lambda: make(torch.device("cpu"), AUTO))
    load_seconds = time.perf_counter() - began

    flops = _probe(embed, index, device)
    limit = CUDA_PIECE_TOKENS
    if device.type == "cpu":  # small enough for several a thread; the runner begins some ahead
        flop_a_token = model_flop(embed.architecture, np.ones(1))
        limit = min(CPU_PIECE_TOKENS, max(FEWEST_TOKENS, int(flops * seconds / 8 / flop_a_token)))
    sample, order = sample_packs(index, MOST_SAMPLES, limit)
    cost = {pack: model_flop(embed.architecture, sample.pack_lengths(pack)) for pack in order}
    order = [pack for pack in order if cost[pack] <= flops * seconds / 2]
    if device.type == "cuda" and order:
        warm_up(embed, sample, order[0], device)
    taken: list[int] = []
    began = time.perf_counter()

    def until_time_is_up() -> Iterator[int]:
        for pack in order:
            if time.perf_counter() - began >= seconds:
                return
            taken.append(pack)
            yield pack

    for _ in embed_packs(embed, sample, until_time_is_up(), device, threads):
        pass
    took = time.perf_counter() - began
    return Calibration(
        device=devices.describe_device(device)["device"],
        precision=precision,
        attention=attention,
        weights="" if source is own else f"untrained weights, as those of {own.name} are not there yet",
        packs=len(taken),
        tokens=int(sum(sample.pack_lengths(pack).sum() for pack in taken)),
        seconds=took,
        flops_per_second=sum(map(cost.__getitem__, taken)) / took if taken else flops * threads,
        threads=threads,
        load_seconds=load_seconds,
        peak=devices.peak_memory(device),
        splits=embed.splits,
    )


def _make_model(index: Index, source: ModelSource, dtype: torch.dtype, device: torch.device, attention: str) -> Encoder:
    try:
        weights = load_weights(source)
        return make_encoder(weights, dtype, index.max_tokens, device, attention)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise SeqmillError(f"{source.name} does not fit the memory of {device}: {error}") from error
        raise


def _probe(embed: PackEmbedder, index: Index, device: torch.device) -> float:
    """Return the FLOP/s of the beginning of one short sequence by itself, on a CPU with one thread."""
    tokens = np.array(index.row_segments(index.num_computed - 1)[-1][:PROBE_TOKENS])
    pack = Pack.from_tokens(tokens, np.array([len(tokens)], np.int64))
    pack = Pack(pack.tokens.int().to(device), pack.cu_seqlens.to(device), pack.lengths)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(2):  # at first kernels are loaded and compiled
            began = time.perf_counter()
            embed(pack).rows.sum().item()  # waits for the device
            took = time.perf_counter() - began
    finally:
        torch.set_num_threads(before)
    return model_flop(embed.architecture, pack.lengths) / took


def sample_packs(index: Index, most: int, limit: int) -> tuple[Index, list[int]]:
    """Return an index with the beginnings of some packs, and these in the order to try them, which is always the same.

    Args:
        index: whole.
        most: of packs, taken from all over the index.
        limit: tokens from each pack, but at least one segment.

    Returns:
        An index of which every second pack is a sample, every segment a sequence; the numbers of the samples.
    """
    tried = list(islice(sample_order(index.num_packs), most))
    begins = index.segment_offsets if index.has_segments else index.token_offsets
    edges, checksums = [], []
    for pack in sorted(tried):
        first = index.first_segment(pack)
        inside = begins[first : first + len(index.pack_lengths(pack)) + 1]
        number = max(int(np.searchsorted(inside, inside[0] + limit, side="right")) - 1, 1)
        edges += [first, first + number]
        checksums += [zlib.crc32(index.pack_tokens(pack)[: inside[number] - inside[0]]), 0]
    sample = replace(
        index,
        token_offsets=begins,
        pack_offsets=np.array(edges, np.int64),
        pack_checksums=np.array(checksums[:-1], np.uint32),
        sequence_segments=np.empty(0, np.int64),
        segment_offsets=np.empty(0, np.int64),
        segment_lengths=np.empty(0, np.int32),
    )
    places = {pack: 2 * place for place, pack in enumerate(sorted(tried))}
    return sample, [places[pack] for pack in tried]


def sample_order(number: int) -> Iterator[int]:
    """Yield 0 to number - 1 so that any first few lie evenly: van der Corput's sequence, bits read backwards."""
    bits = max(number - 1, 0).bit_length()
    backwards = (int(f"{value:0{max(bits, 1)}b}"[::-1], 2) for value in range(1 << bits))
    return (value for value in backwards if value < number)


def describe_calibration(measured: Calibration, shares: Shares) -> list[str]:
    """Return the time and memory to expect by what was measured, in lines."""
    seconds = measured.shard_seconds(shares)
    peak = measured.peak
    if measured.packs:
        speed = f"{measured.tokens / measured.seconds:,.0f} tokens/s by {measured.packs} samples of packs"
        speed += f", {measured.tokens:,} tokens in {measured.seconds:.1f} s"
    else:
        speed = f"guessed from {PROBE_TOKENS} tokens, as every sequence takes too long for a trial"
    memory = f"{size_in_words(peak['peak_host_bytes'])} by this process"
    if "peak_device_bytes" in peak:
        memory += f", {size_in_words(peak['peak_device_bytes'])} on the GPU"
    longest, together, load = map(time_in_words, (seconds.max(), seconds.sum(), measured.load_seconds))
    lines = [
        line("device", f"{measured.device}, {measured.precision}, attention {measured.attention}"),
        line("speed", speed),
        line("time", f"{longest} for the longest shard, {together} one after another"),
        line("", f"besides, each shard: {load} for the model, 10 s or 1 % for its audit"),
        line("memory", f"{memory}; {size_in_words(available_memory())} free"),
    ]
    if measured.weights:
        lines.insert(1, line("", measured.weights))
    if measured.splits:
        lines.append(line("", f"{measured.splits} packs do not fit the device and are computed in pieces"))
    return lines
