#!/usr/bin/env python3
"""Time each step of the CPU engine: precision, threads, attention kernel; and the kernels alone.

python benchmarks/cpu_steps.py --output benchmarks/results/cpu_steps.md
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
from proteins import random_proteins, write_fasta

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from seqmill.base.machine import processor
from seqmill.embed.embedder import PackEmbedder
from seqmill.embed.pooling import mean_over_residues
from seqmill.embed.readout import Readout
from seqmill.embed.runner import CPU_PIECE_TOKENS, embed_packs
from seqmill.index.build import build_index
from seqmill.model.attention import attend, choose_kernel
from seqmill.model.esm2 import ESM2, rope_tables
from seqmill.model.pack import Pack
from seqmill.model.weights import untrained_tensors
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import MODELS
from seqmill.spec.outputs import Outputs
from seqmill.store.index import Index, open_index

CPU = torch.device("cpu")
THREADS = os.cpu_count() or 1
EVERY = {"esm2_t6_8M_UR50D": 4, "esm2_t12_35M_UR50D": 8, "esm2_t30_150M_UR50D": 32}  # every n-th pack is timed
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the Markdown file to write")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        write_fasta(Path(folder, "p.faa"), random_proteins(500))
        build_index(Path(folder, "p.faa"), Path(folder, "i.h5"), "", LengthPolicy())
        index = open_index(Path(folder, "i.h5"))
        head = f"{processor()[0]}, {THREADS} cores, torch {torch.__version__}, {date.today().isoformat()}."
        lines = [head, "", *engine_table(index), "", *kernel_table(), "", *host_lines(index)]
    output.write_text("\n".join(lines) + "\n")
    print(output.read_text())


def engine_table(index: Index) -> list[str]:
    """Return a table of tokens/s of the computation alone. The variants take turns; median of the rounds."""
    lines = ["| model | precision | attention | threads | tokens/s |", "|---|---|---|---|---|"]
    for name, every in EVERY.items():
        architecture, packs = MODELS[name], range(0, index.num_packs, every)
        tensors = untrained_tensors(architecture)
        num_tokens = sum(int(index.pack_lengths(pack).sum()) for pack in packs)
        models = {
            ("float32", "sdpa"): ESM2(architecture, tensors, torch.float32, index.max_tokens, "sdpa"),
            ("bfloat16", "sdpa"): ESM2(architecture, tensors, torch.bfloat16, index.max_tokens, "sdpa"),
        }
        kernel = choose_kernel(CPU, torch.bfloat16, architecture.head_dim)
        models["bfloat16", kernel] = ESM2(architecture, tensors, torch.bfloat16, index.max_tokens, kernel)
        rates: dict[tuple[str, str, str], list[float]] = {}
        for _ in range(ROUNDS):
            for (precision, attention), model in models.items():
                for way in (threads_within_operations, one_thread_per_piece):
                    start = time.perf_counter()
                    way(model, index, packs)
                    rate = num_tokens / (time.perf_counter() - start)
                    rates.setdefault((precision, attention, way.__name__.replace("_", " ")), []).append(rate)
        lines += [f"| {name} | {' | '.join(key)} | {statistics.median(found):,.0f} |" for key, found in rates.items()]
    return lines


def threads_within_operations(model: ESM2, index: Index, packs: range) -> None:
    """Compute one pack at a time, with PyTorch's threads within each operation."""
    torch.set_num_threads(THREADS)
    for number in packs:
        pack = Pack.from_tokens(index.pack_tokens(number), index.pack_lengths(number))
        mean_over_residues(model(pack), pack)


def embedder(model: ESM2) -> PackEmbedder:
    return PackEmbedder(model, Readout("esm2", Outputs((len(model.layers),))), lambda: model)


def one_thread_per_piece(model: ESM2, index: Index, packs: range) -> None:
    """Compute as the runner does, with one thread per piece of a pack."""
    for _ in embed_packs(embedder(model), index, packs, CPU, THREADS):
        pass


def kernel_table() -> list[str]:
    """Return a table of microseconds per token for rotation and attention, on one thread with 20 heads."""
    lines = ["| head dim | length | sdpa, us/token | avx512, us/token | ratio |", "|---|---|---|---|---|"]
    torch.set_num_threads(1)
    for head_dim in (16, 24, 32, 64):
        if choose_kernel(CPU, torch.bfloat16, head_dim) != "avx512":
            return ["This machine has no avx512 kernel."]
        for length in (50, 128, 350, 1024):
            count = max(2048 // length, 1)
            pack = Pack.from_tokens(np.zeros(count * length, np.uint8), np.full(count, length))
            qkv = torch.randn(count * length, 3, 20, head_dim).bfloat16()
            cos, sin = rope_tables(length, head_dim, torch.float32)
            times = {k: best(partial(attend, k, qkv, cos, sin, pack)) for k in ("sdpa", "avx512")}
            each = [times[kernel] / len(pack.tokens) * 1e6 for kernel in ("sdpa", "avx512")]
            lines.append(f"| {head_dim} | {length} | {each[0]:.2f} | {each[1]:.2f} | {each[0] / each[1]:.1f}x |")
    return lines


def host_lines(index: Index) -> list[str]:
    """Return the share of reading, packing, and pooling in the time of the smallest model."""
    torch.set_num_threads(1)
    architecture = MODELS["esm2_t6_8M_UR50D"]
    kernel = choose_kernel(CPU, torch.bfloat16, architecture.head_dim)
    model = ESM2(architecture, untrained_tensors(architecture), torch.bfloat16, index.max_tokens, kernel)
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
