#!/usr/bin/env python3
"""Compare attention with linear biases on a CPU: our AVX512-BF16 kernel and PyTorch's, in bfloat16 on one thread.

python benchmarks/alibi_kernels.py

The kernels take turns. Our kernel skips keys whose weights are lost in rounding, by a bound from the norms of queries
and keys, so its time depends on the scores. The queries and keys are random, have DNABERT-S's shape, and are multiplied
by one of several factors. Without a factor, their norms are near 8 and the scores near 1.
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from seqmill.base.machine import processor
from seqmill.model.alibi import attend, choose_kernel, make_biases
from seqmill.model.pack import Pack
from seqmill.spec.models import DNABERT_MODELS

SHAPE = DNABERT_MODELS["dnabert_s"]
TOKENS = 4000  # per pack, or one sequence if that is longer
LENGTHS = (100, 500, 2000, 5000)
FACTORS = (1.0, 3.0, 10.0)
ROUNDS = 9


def main() -> None:
    torch.set_num_threads(1)
    choose_kernel(torch.device("cpu"), torch.bfloat16, SHAPE.head_dim, "avx512_bf16")  # raises an error with the reason
    print(f"{processor()[0]}, one thread, torch {torch.__version__}, bfloat16, median of {ROUNDS} rounds\n")
    print("| tokens | scores x | sdpa, ms | avx512_bf16, ms | ratio |")
    print("|---|---|---|---|---|")
    for length in LENGTHS:
        for factor in FACTORS:
            sdpa, ours, ratio = compare(length, factor)
            print(f"| {length} | {factor**2:.0f} | {1e3 * sdpa:.1f} | {1e3 * ours:.1f} | {ratio:.1f} |", flush=True)


def compare(length: int, factor: float) -> tuple[float, float, float]:
    """Return median seconds of sdpa and avx512_bf16, and the median of their ratios, over sequences of one length."""
    count = max(TOKENS // length, 1)
    pack = Pack.from_tokens(np.zeros(count * length, np.uint16), np.full(count, length, np.int64))
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(count * length, 3, SHAPE.num_heads, SHAPE.head_dim, generator=generator)
    qkv[:, :2] *= factor
    qkv = qkv.bfloat16()
    tables = {kernel: make_biases(kernel, SHAPE.num_heads, length, torch.float32) for kernel in ("sdpa", "avx512_bf16")}
    seconds: dict[str, list[float]] = {kernel: [] for kernel in tables}
    for _ in range(ROUNDS + 1):
        for kernel, biases in tables.items():
            start = time.perf_counter()
            attend(kernel, qkv, biases, pack)
            seconds[kernel].append(time.perf_counter() - start)
    sdpa, ours = (times[1:] for times in seconds.values())  # the first round warms up
    ratios = [theirs / own for theirs, own in zip(sdpa, ours, strict=True)]
    return statistics.median(sdpa), statistics.median(ours), statistics.median(ratios)


if __name__ == "__main__":
    main()
