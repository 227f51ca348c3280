"""The variants of a model on a GPU: every precision and every switch, timed from tokens to embeddings on the host."""

import gc
import math
import statistics
import time
import zlib
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import torch
from gpu_packs import Packs, random_packs
from gpu_sizes import SIZES

from seqmill.embedding.device import dtype_of, float32_sums
from seqmill.embedding.embedder import PackEmbedder
from seqmill.embedding.monitor import gpu_use, monitor
from seqmill.embedding.readout import Readout
from seqmill.model import alibi, attention
from seqmill.model.dnabert_s import DnabertS
from seqmill.model.elementwise import EAGER, TRITON, choose_elementwise
from seqmill.model.encoder import Encoder
from seqmill.model.esm2 import ESM2
from seqmill.model.layers import TORCH
from seqmill.model.pack import Pack
from seqmill.model.weights import parameter_shapes
from seqmill.spec import models
from seqmill.spec.architectures import Architecture, DnabertArchitecture, model_flop
from seqmill.spec.outputs import Outputs

try:
    from seqmill.embedding.runner import embed_packs
except ImportError:  # it needs h5py
    embed_packs = None

ROUNDS = 2
SAMPLED = 16  # packs that are timed alone
CLOCK = 2e9  # cycles per second, roughly: for a pause on the device


@dataclass(frozen=True)
class Way:
    """A variant: the switches of a model. `products` is empty if the model has no such switch."""

    precision: str
    attention: str
    elementwise: str
    products: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, asdict(self).values()))


class Measured:
    """A model to measure, with seeded weights made on the device, in no file."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.architecture: Architecture = SIZES.models[name]
        self.is_dnabert = isinstance(self.architecture, DnabertArchitecture)

    @cached_property
    def packs(self) -> Packs:
        return random_packs(self.architecture)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights spread as those of `untrained_tensors`, which would take a minute for the largest model."""
        tensors = {}
        for name, shape in parameter_shapes(self.architecture).items():
            generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
            values = torch.rand(shape, generator=generator, device=self.device) * 2 - 1
            if len(shape) == 2:
                values *= math.sqrt(3 / (1 if name.startswith("embed.") else shape[1]))
            else:
                values = 0.1 * values + ("norm" in name and name.endswith(".weight"))
            tensors[name] = values
        return tensors

    @cached_property
    def exact(self) -> np.ndarray:
        """Embeddings of the checked packs in float32, eager, with PyTorch's attention."""
        model = self.make(Way("float32", "sdpa", EAGER))
        return self.embeddings(model, self.checked)

    @property
    def checked(self) -> list[int]:
        return [self.packs.num_packs // 2, self.packs.num_packs - 1]

    def ways(self) -> list[Way]:
        """Return the variants, the default first; each other differs from it in one switch."""
        family, device, bfloat16 = (alibi if self.is_dnabert else attention), self.device, torch.bfloat16
        head_dim = self.architecture.head_dim
        elementwise = choose_elementwise(device, bfloat16, (self.architecture.hidden_dim, self.architecture.ffn_dim))
        default = Way("bfloat16", family.choose_kernel(device, bfloat16, head_dim), elementwise)
        if not self.is_dnabert:
            default = replace(default, products=TORCH)
        half = family.choose_kernel(device, torch.float16, head_dim)
        found = [default, replace(default, precision="float16", attention=half)]
        found.append(replace(default, precision="float8"))
        if not self.is_dnabert:
            found.append(replace(default, products=TRITON))
        if elementwise != EAGER:
            found.append(replace(default, elementwise=EAGER))
        kernels = [name for name in family.FASTEST_FIRST if not family.why_not(name, device, bfloat16, head_dim)]
        return found + [replace(default, attention=name) for name in kernels if name != default.attention]

    def make(self, way: Way) -> Encoder:
        dtype = dtype_of(way.precision)
        options = {"products": way.products} if way.products else {}
        kind = DnabertS if self.is_dnabert else ESM2
        kernels = way.attention, way.elementwise
        model = kind(self.architecture, self.tensors, dtype, self.packs.max_tokens, *kernels, **options)
        return model.to(self.device)

    def embedder(self, model: Encoder) -> PackEmbedder:
        outputs = Outputs((len(model.layers),))
        return PackEmbedder(
            model, Readout(models.DNABERT_S if self.is_dnabert else models.ESM2, outputs), lambda: model
        )

    def embeddings(self, model: Encoder, packs: list[int]) -> np.ndarray:
        """Return the embeddings of packs, by the runner, or one pack after another where it can't be imported."""
        embed = self.embedder(model)
        if embed_packs is not None:
            return np.concatenate([rows for _, rows, _ in embed_packs(embed, self.packs, packs, self.device, 1)])
        with float32_sums():
            return np.concatenate([embed(self.on_device(pack)).rows.cpu().numpy() for pack in packs])

    def on_device(self, number: int) -> Pack:
        pack = Pack.from_tokens(self.packs.pack_tokens(number).astype(np.int32), self.packs.pack_lengths(number))
        return Pack(pack.tokens.to(self.device), pack.cu_seqlens.to(self.device), pack.lengths)

    def seconds(self, model: Encoder, packs: list[int]) -> float:
        """Return the seconds from tokens on the host to embeddings on the host."""
        start = time.perf_counter()
        self.embeddings(model, packs)
        return time.perf_counter() - start


def measure(measured: Measured, way: Way) -> dict:
    """Return the figures of a variant."""
    device, packs = measured.device, measured.packs
    exact = measured.exact
    held = sum(tensor.nbytes for tensor in measured.tensors.values())
    model = measured.make(way)
    found = measured.embeddings(model, measured.checked)
    pace = measured.seconds(model, packs.evenly(4)) / len(packs.evenly(4))
    chosen = packs.evenly(round(SIZES.round_seconds / pace))
    lengths = np.concatenate([packs.pack_lengths(pack) for pack in chosen])
    reset_peak(device)
    with monitor(device, seconds=0.1) as samples:
        seconds = [measured.seconds(model, chosen) for _ in range(ROUNDS)]
    peak = torch.cuda.max_memory_allocated(device) - held
    sample = [chosen[place] for place in np.linspace(0, len(chosen) - 1, min(SAMPLED, len(chosen))).astype(int)]
    host, _ = pack_seconds(measured, model, sample[0], 0.0)
    alone = [pack_seconds(measured, model, pack, 2 * host) for pack in sample]
    tokens = int(sum(packs.pack_lengths(pack).sum() for pack in sample))
    device_rate = tokens / sum(on_device for _, on_device in alone)
    rate = int(lengths.sum()) / statistics.median(seconds)
    return {
        "model": measured.name,
        **asdict(way),
        "packs": len(chosen),
        "tokens": int(lengths.sum()),
        "flop": model_flop(measured.architecture, lengths),
        "seconds": seconds,
        "tokens_per_second": rate,
        "host_share": max(0.0, 1 - rate / device_rate),
        "host_seconds": statistics.median(host for host, _ in alone),
        "device_seconds": statistics.median(on_device for _, on_device in alone),
        "peak_bytes": peak,
        "worst_cosine_to_float32": worst_cosine(found, exact),
        "runner": embed_packs is not None,
        **gpu_use(samples),
    }


def pack_seconds(measured: Measured, model: Encoder, number: int, pause: float) -> tuple[float, float]:
    """Return the host's seconds to queue a pack, and the device's seconds to compute it.

    The device is first kept busy for `pause` seconds; if that is longer than the host takes to queue the pack, the
    device never waits for the host while it computes.
    """
    pack, embed = measured.on_device(number), measured.embedder(model)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(measured.device)
    with float32_sums():
        torch.cuda._sleep(int(pause * CLOCK))
        start = time.perf_counter()
        first.record()
        embed(pack)
        last.record()
        host = time.perf_counter() - start
    last.synchronize()
    return host, first.elapsed_time(last) / 1e3


def worst_cosine(found: np.ndarray, expected: np.ndarray) -> float:
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    return float(cosines.min())


def reset_peak(device: torch.device) -> None:
    """Free what earlier steps have left behind; raise if this process can't use the device any more."""
    gc.collect()
    torch.ones(1, device=device).sum().item()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
