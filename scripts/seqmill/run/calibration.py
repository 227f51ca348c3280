"""Measures the speed of this device: computes packs from all over an index for a few seconds, as a worker would."""

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
from seqmill.embedding import device as devices
from seqmill.embedding.embedder import PackEmbedder
from seqmill.embedding.readout import Readout
from seqmill.embedding.runner import CPU_PIECE_TOKENS, CUDA_PIECE_TOKENS, embed_packs, warm_up
from seqmill.errors import SeqmillError
from seqmill.model.encoder import Encoder, faster_kernels, make_encoder
from seqmill.model.out_of_memory import is_out_of_memory
from seqmill.model.pack import Pack
from seqmill.model.weights import load_weights
from seqmill.run.forecast import Shares, line
from seqmill.spec.architectures import model_flop
from seqmill.spec.models import UNTRAINED_PREFIX, ModelSource, find_model
from seqmill.spec.task import AUTO, ComputeSettings
from seqmill.store.index import Index

PROBE_TOKENS = 256  # of the sequence that is timed first, to limit the samples
FEWEST_TOKENS = 128  # of a sample, on a slow CPU
MOST_SAMPLES = 512


@dataclass(frozen=True)
class Calibration:
    """The speed of this device."""

    device: str  # its name, precision and kernels, as a worker would choose them
    faster: list[str]  # other settings or an installation that would be faster on this device
    weights: str  # that untrained weights were used instead of missing ones; else empty
    packs: int  # that the samples come from; 0 if all sequences are too long for the time
    tokens: int  # in the samples
    seconds: float  # wall time of the samples
    flops_per_second: float  # of all threads or of the GPU; see `seqmill.spec.models.model_flop`
    threads: int  # samples computed at a time; 1 on a GPU
    load_seconds: float  # to load the model
    peak: dict[str, int]  # `seqmill.embedding.device.peak_memory`, in bytes
    splits: int  # samples that did not fit the device's memory

    def shard_seconds(self, shares: Shares) -> np.ndarray:
        """Return the expected seconds to compute each shard, float64 (world_size,).

        At least those of its longest segment, which a single thread of a CPU computes.
        """
        rate = self.flops_per_second
        return np.maximum(shares.flop / rate, shares.longest_flop * self.threads / rate)


def calibrate(index: Index, source: ModelSource, settings: ComputeSettings, seconds: float) -> Calibration:
    """Compute samples of packs for about the given time, and drop the results.

    Missing weights of a released model are replaced by untrained ones, which take as long. Raise a SeqmillError for a
    device, precision or kernel that is not available, damaged weights, or too little memory.
    """
    device = devices.choose_device(settings.device)
    precision = devices.choose_precision(settings.precision, device)
    threads = 1 if device.type == "cuda" else settings.threads or torch.get_num_threads()
    began, weights = time.perf_counter(), ""
    if source.kind == "released" and not all(file.exists() for file in source.files):
        weights = f"untrained weights, as those of {source.name} are not there yet"
        source = find_model(UNTRAINED_PREFIX + source.name)
    make = partial(_make_model, index, source, devices.dtype_of(precision))
    model = make(device, settings.attention)
    name = f"{devices.describe_device(device)['device']}, {precision}, attention {model.attention}"
    name += f", elementwise {model.elementwise}"
    readout = Readout(source.family, settings.outputs.of(model.architecture.num_layers))
    embed = PackEmbedder(model, readout, lambda: make(torch.device("cpu"), AUTO))
    load_seconds = time.perf_counter() - began

    flops = _probe(embed, index, device)
    limit = CUDA_PIECE_TOKENS
    if device.type == "cpu":  # several samples per thread; the runner starts some ahead
        flop_per_token = model_flop(embed.architecture, np.ones(1))
        limit = min(CPU_PIECE_TOKENS, max(FEWEST_TOKENS, int(flops * seconds / 8 / flop_per_token)))
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
        device=name,
        faster=what_is_faster(model, precision, device),
        weights=weights,
        packs=len(taken),
        tokens=int(sum(sample.pack_lengths(pack).sum() for pack in taken)),
        seconds=took,
        flops_per_second=sum(map(cost.__getitem__, taken)) / took if taken else flops * threads,
        threads=threads,
        load_seconds=load_seconds,
        peak=devices.peak_memory(device),
        splits=embed.splits,
    )


def what_is_faster(model: Encoder, precision: str, device: torch.device) -> list[str]:
    """Return the settings, or the installation, that would be faster on this device, in words."""
    best = devices.choose_precision(AUTO, device)
    slower = precision == "float32" if device.type == "cuda" else True
    found = [f"precision {best} instead of {precision}"] if slower and precision != best else []
    kernels = faster_kernels(model.architecture, devices.dtype_of(precision), device, model.attention)
    return found + [f"attention {name}" + (f" ({reason})" if reason else "") for name, reason in kernels[:1]]


def _make_model(index: Index, source: ModelSource, dtype: torch.dtype, device: torch.device, attention: str) -> Encoder:
    try:
        return make_encoder(load_weights(source), dtype, index.max_tokens, device, attention)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise SeqmillError(f"{source.name} does not fit the memory of {device}: {error}") from error
        raise


def _probe(embed: PackEmbedder, index: Index, device: torch.device) -> float:
    """Return the FLOP/s for the beginning of one short sequence, on a CPU with one thread."""
    tokens = np.array(index.row_segments(index.num_computed - 1)[-1][:PROBE_TOKENS])
    pack = Pack.from_tokens(tokens, np.array([len(tokens)], np.int64))
    pack = Pack(pack.tokens.int().to(device), pack.cu_seqlens.to(device), pack.lengths)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(2):  # the first time, kernels are loaded and compiled
            began = time.perf_counter()
            embed(pack).rows.sum().item()  # waits for the device
            took = time.perf_counter() - began
    finally:
        torch.set_num_threads(before)
    return model_flop(embed.architecture, pack.lengths) / took


def sample_packs(index: Index, most: int, limit: int) -> tuple[Index, list[int]]:
    """Sample an index: at most `most` packs from all over it, of each the first segments up to `limit` tokens.

    Return an index in which every second pack is a sample and every segment is a sequence, and the numbers of the
    samples in the order to compute them.
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
    """Yield 0 to number - 1, any first few evenly spread: van der Corput's sequence, with its bits reversed."""
    bits = max(number - 1, 0).bit_length()
    backwards = (int(f"{value:0{max(bits, 1)}b}"[::-1], 2) for value in range(1 << bits))
    return (value for value in backwards if value < number)


def describe_calibration(measured: Calibration, shares: Shares) -> list[str]:
    """Describe the time and memory to expect, in lines."""
    seconds, peak = measured.shard_seconds(shares), measured.peak
    speed = f"guessed from {PROBE_TOKENS} tokens, as every sequence takes too long for a trial"
    if measured.packs:
        speed = f"{measured.tokens / measured.seconds:,.0f} tokens/s by {measured.packs} samples of packs"
        speed += f", {measured.tokens:,} tokens in {measured.seconds:.1f} s"
    memory = f"{size_in_words(peak['peak_host_bytes'])} by this process"
    if "peak_device_bytes" in peak:
        memory += f", {size_in_words(peak['peak_device_bytes'])} on the GPU"
    longest, together, load = map(time_in_words, (seconds.max(), seconds.sum(), measured.load_seconds))
    splits = f"{measured.splits} packs do not fit the device and are computed in pieces"
    return [
        line("device", measured.device),
        *(line("faster", way) for way in measured.faster),
        *([line("", measured.weights)] if measured.weights else []),
        line("speed", speed),
        line("time", f"{longest} for the longest shard, {together} one after another"),
        line("", f"also for each shard: {load} for the model, 10 s or 1 % for its audit"),
        line("memory", f"{memory}; {size_in_words(available_memory())} free"),
        *([line("", splits)] if measured.splits else []),
    ]
