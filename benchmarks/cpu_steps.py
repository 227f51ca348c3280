#!/usr/bin/env python3
"""Time the CPU engine: each precision and kernel, each step of the forward, and the attention kernels alone.

python benchmarks/cpu_steps.py --output benchmarks/results/cpu_steps.md
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from processor_kind import processor_kind
from proteins import random_proteins, write_fasta

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from seqmill.embedding.embedder import PackEmbedder
from seqmill.embedding.pooling import mean_over_residues
from seqmill.embedding.readout import Readout
from seqmill.embedding.runner import CPU_PIECE_TOKENS, embed_packs
from seqmill.index.build import build_index
from seqmill.model import attention
from seqmill.model.attention import choose_kernel
from seqmill.model.elementwise import EAGER, choose_elementwise, pre_norm
from seqmill.model.encoder import Encoder, make_encoder, pack_weights
from seqmill.model.esm2 import ESM2, rope_tables
from seqmill.model.kernels import compiled
from seqmill.model.layers import Linear
from seqmill.model.pack import Pack
from seqmill.model.weights import Weights, untrained_tensors
from seqmill.spec.architectures import Esm2Architecture
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import MODELS
from seqmill.spec.outputs import Outputs
from seqmill.store.index import Index, open_index

CPU = torch.device("cpu")
THREADS = os.cpu_count() or 1
EVERY = {"esm2_t6_8M_UR50D": 8, "esm2_t12_35M_UR50D": 16, "esm2_t30_150M_UR50D": 64}  # every n-th pack is timed
STEPS = {**{name: MODELS[name].num_layers for name in EVERY}, "esmc_300m": 30, "prott5_xl_u50": 2}  # layers
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the Markdown file to write")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        write_fasta(Path(folder, "p.faa"), random_proteins(500))
        build_index(Path(folder, "p.faa"), Path(folder, "i.h5"), "", LengthPolicy())
        index = open_index(Path(folder, "i.h5"))
        head = f"{processor_kind()[1]}, {THREADS} cores, torch {torch.__version__}, {date.today().isoformat()}."
        lines = [
            head,
            "",
            *engine_table(index),
            "",
            *step_table(),
            "",
            *part_table(),
            "",
            *kernel_table(),
            "",
            *host_lines(index),
        ]
    output.write_text("\n".join(lines) + "\n")
    print(output.read_text())


def engine_table(index: Index) -> list[str]:
    """Return a table of tokens/s of the computation alone. The variants take turns; median of the rounds."""
    lines = ["| model | precision | attention | elementwise | threads | tokens/s |", "|---|---|---|---|---|---|"]
    for name, every in EVERY.items():
        architecture, packs = MODELS[name], range(0, index.num_packs, every)
        tensors = untrained_tensors(architecture)
        num_tokens = sum(int(index.pack_lengths(pack).sum()) for pack in packs)
        models = {
            (str(dtype).removeprefix("torch."), attention, elementwise): ESM2(
                architecture, tensors, dtype, index.max_tokens, attention, elementwise
            )
            for dtype in (torch.float32, torch.bfloat16)
            for attention, elementwise in dict.fromkeys([("sdpa", EAGER), kernels(architecture, dtype)])
        }
        for model in models.values():
            pack_weights(model)
        rates: dict[tuple[str, ...], list[float]] = {}
        for _ in range(ROUNDS):
            for variant, model in models.items():
                for way in (threads_within_operations, one_thread_per_piece):
                    start = time.perf_counter()
                    way(model, index, packs)
                    rate = num_tokens / (time.perf_counter() - start)
                    rates.setdefault((*variant, way.__name__.replace("_", " ")), []).append(rate)
        lines += [f"| {name} | {' | '.join(key)} | {statistics.median(found):,.0f} |" for key, found in rates.items()]
    return lines


def kernels(architecture: Esm2Architecture, dtype: torch.dtype) -> tuple[str, str]:
    """Return the attention and elementwise kernels that a worker would choose here."""
    dims = architecture.hidden_dim, architecture.ffn_dim
    return choose_kernel(CPU, dtype, architecture.head_dim), choose_elementwise(CPU, dtype, dims)


def step_table() -> list[str]:
    """Return a table of each step's processor time, in microseconds per token, on one thread at length 350."""
    lines = ["| model | precision | products | attention | norms and the rest | all |", "|---|---|---|---|---|---|"]
    torch.set_num_threads(1)
    pack = Pack.from_tokens(np.full(5 * 350, 5, np.uint8), np.full(5, 350))
    for name, layers in STEPS.items():
        architecture = replace(MODELS[name], num_layers=layers)
        weights = Weights(architecture, untrained_tensors(architecture), "", trained=False)
        for dtype in (torch.bfloat16, torch.float32):
            model = make_encoder(weights, dtype, 350, CPU)
            model(pack)
            products = attended = total = float("inf")
            for _ in range(ROUNDS):
                spent = {"products": 0.0, "attention": 0.0}
                with timed_steps(model, spent):
                    start = time.thread_time()
                    model(pack)
                    took = time.thread_time() - start
                if took < total:
                    products, attended, total = spent["products"], spent["attention"], took
            each = [seconds / len(pack.tokens) * 1e6 for seconds in (products, attended, total - products - attended)]
            cells = " | ".join(f"{value:,.1f}" for value in (*each, sum(each)))
            shown = name if layers == MODELS[name].num_layers else f"{name}, {layers} layers"
            lines.append(f"| {shown} | {str(dtype).removeprefix('torch.')} | {cells} |")
    return lines


@contextmanager
def timed_steps(model: Encoder, spent: dict[str, float]) -> Iterator[None]:
    """Add the processor time of a model's products (with activation) and of its attention to `spent`, in seconds."""
    started = [0.0]
    family = sys.modules[type(model).__module__]
    plain = family.attend

    def begin(*_: object) -> None:
        started[0] = time.thread_time()

    def end(*_: object) -> None:
        spent["products"] += time.thread_time() - started[0]

    def attend(*arguments: object) -> torch.Tensor:
        start = time.thread_time()
        result = plain(*arguments)
        spent["attention"] += time.thread_time() - start
        return result

    hooks = [
        register(hook)
        for module in model.modules()
        if isinstance(module, Linear)
        for register, hook in ((module.register_forward_pre_hook, begin), (module.register_forward_hook, end))
    ]
    family.attend = attend
    try:
        yield
    finally:
        family.attend = plain
        for hook in hooks:
            hook.remove()


def threads_within_operations(model: ESM2, index: Index, packs: range) -> None:
    """Compute one pack at a time, with PyTorch's threads within each operation."""
    torch.set_num_threads(THREADS)
    for number in packs:
        pack = Pack.from_tokens(index.pack_tokens(number), index.pack_lengths(number))
        mean_over_residues(model(pack), pack)


def embedder(model: ESM2) -> PackEmbedder:
    return PackEmbedder(model, Readout(model.architecture.family, Outputs((len(model.layers),))), lambda: model)


def one_thread_per_piece(model: ESM2, index: Index, packs: range) -> None:
    """Compute as the runner does, with one thread per piece of a pack."""
    for _ in embed_packs(embedder(model), index, packs, CPU, THREADS):
        pass


def kernel_table() -> list[str]:
    """Return a table of microseconds per token for rotation and attention, on one thread with 20 heads."""
    lines = ["| kernel | head dim | length | sdpa, us/token | ours, us/token | ratio |", "|---|---|---|---|---|---|"]
    torch.set_num_threads(1)
    for name in (name for name in compiled.KERNELS if compiled.load(name)):
        dtype = compiled.KERNELS[name].dtype
        for head_dim, length in itertools.product((16, 24, 32, 64), (50, 128, 350, 1024)):
            count = max(2048 // length, 1)
            pack = Pack.from_tokens(np.zeros(count * length, np.uint8), np.full(count, length))
            qkv = torch.randn(count * length, 3, 20, head_dim).to(dtype)
            cos, sin = rope_tables(length, head_dim, torch.float32)
            times = [best(partial(attention.attend, kernel, qkv, cos, sin, pack)) for kernel in ("sdpa", name)]
            each = [seconds / len(pack.tokens) * 1e6 for seconds in times]
            lines.append(
                f"| {name} | {head_dim} | {length} | {each[0]:.2f} | {each[1]:.2f} | {each[0] / each[1]:.1f}x |"
            )
    return lines


def part_table() -> list[str]:
    """Return a table of PyTorch's time over ours, on one thread, of a norm and of the widest product with its GELU."""
    lines = ["| model | precision | residual, norm, rounding | product, bias, GELU |", "|---|---|---|---|"]
    torch.set_num_threads(1)
    for name, dtype in itertools.product(EVERY, (torch.bfloat16, torch.float32)):
        architecture = MODELS[name]
        dim, wide = architecture.hidden_dim, architecture.ffn_dim
        x, weight, bias = torch.randn(CPU_PIECE_TOKENS, dim), torch.randn(wide, dim), torch.randn(wide)
        delta, rows = x.to(dtype), x.to(dtype)
        one, zero = torch.ones(dim), torch.zeros(dim)
        norms = [
            best(partial(pre_norm, kernel, x, delta, one, zero, 1e-5, dtype))
            for kernel in (EAGER, kernels(architecture, dtype)[1])
        ]
        product = Linear({"weight": weight, "bias": bias}, "", dtype, activation="gelu")
        plain = best(partial(product_then_gelu, rows, weight.to(dtype), bias.to(dtype)))
        product.pack()
        ratio = plain / best(partial(product, rows))
        precision = str(dtype).removeprefix("torch.")
        lines.append(f"| {name} | {precision} | {norms[0] / norms[1]:.1f}x | {ratio:.2f}x |")
    return lines


def product_then_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.gelu(F.linear(x, weight, bias))


def host_lines(index: Index) -> list[str]:
    """Return the share of reading, packing, and pooling in the time of the smallest model."""
    torch.set_num_threads(1)
    architecture = MODELS["esm2_t6_8M_UR50D"]
    tensors, dtype = untrained_tensors(architecture), torch.bfloat16
    model = ESM2(architecture, tensors, dtype, index.max_tokens, *kernels(architecture, dtype))
    number = index.num_packs // 2

    def read() -> list[Pack]:
        return Pack.from_tokens(index.pack_tokens(number), index.pack_lengths(number)).split(CPU_PIECE_TOKENS)

    (piece, *_) = read()
    hidden = model(piece)
    host = best(read) + best(lambda: mean_over_residues(hidden, piece))
    share = host / (host + best(lambda: model(piece)))
    return [f"Reading, packing and pooling of a pack at 8M: {share:.1%} of the time on one thread."]


def best(work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of several calls, after a warm-up call."""
    work()
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
