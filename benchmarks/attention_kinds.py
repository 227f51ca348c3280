#!/usr/bin/env python3
"""Compare T5's and ESM C's attention on a CPU: our kernels and PyTorch's, in bfloat16 and float32 on one thread.

python benchmarks/attention_kinds.py

The kernels take turns, and processor time counts. PyTorch's scaled_dot_product_attention gets T5's biases as a finished
mask, of which the time is not counted. For ESM C, it runs after PyTorch's layer norms of queries and keys and our eager
rotation.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from seqmill.base.machine import processor
from seqmill.model.attention import rotate
from seqmill.model.esm2 import rope_tables
from seqmill.model.kernels import compiled, cpu

TOKENS = 2000  # per pack
LENGTHS = (350, 1000)
SPAN = 128
EPS = 1e-5
ROUNDS = 5
Attend = Callable[[], torch.Tensor]


def main() -> None:
    torch.set_num_threads(1)
    print(f"{processor()[0]}, one thread, torch {torch.__version__}, processor time, median of {ROUNDS} rounds\n")
    print("| attention | tokens | kernel | PyTorch, ms | ours, ms | ratio | difference |")
    print("|---|---|---|---|---|---|---|")
    for name, make in (("T5, 32 heads of 128", relative), ("ESM C, 15 heads of 64", normalized)):
        for length in LENGTHS:
            for kernel in compiled.KERNELS:
                if not compiled.why_not(kernel):
                    print(f"| {name} | {length} | {kernel} | {compare(*make(kernel, length))} |", flush=True)


def relative(kernel: str, length: int) -> tuple[Attend, Attend]:
    """Return T5's attention over sequences of one length by PyTorch and by us: the same biases as a mask and a row."""
    qkv, lengths = random_qkv(kernel, length, 32, 128)
    qkv[:, :2] *= 0.5  # scores have a standard deviation of 3
    biases = torch.randn(32, 2 * SPAN + 1)
    places = torch.arange(length)
    mask = biases[:, SPAN + (places - places[:, None]).clamp(-SPAN, SPAN)].to(qkv.dtype)
    q, k, v = by_sequence(qkv, length)
    return (
        lambda: F.scaled_dot_product_attention(q, k, v, mask, scale=1.0),
        lambda: cpu.relative_attention(kernel, qkv, biases, lengths),
    )


def normalized(kernel: str, length: int) -> tuple[Attend, Attend]:
    """Return ESM C's attention over sequences of one length by PyTorch and by us."""
    qkv, lengths = random_qkv(kernel, length, 15, 64)
    width = 15 * 64
    cos, sin = rope_tables(length, 64, torch.float32)
    places = torch.arange(len(qkv)) % length
    weights = [torch.ones(width), torch.ones(width)]

    def pytorchs() -> torch.Tensor:
        q, k = (
            F.layer_norm(qkv[:, part].flatten(1), (width,), weight.to(qkv.dtype), eps=EPS).view(-1, 15, 64)
            for part, weight in enumerate(weights)
        )
        rotated = rotate(torch.stack((q, k), dim=1), cos[places], sin[places])
        return F.scaled_dot_product_attention(*by_sequence(torch.cat((rotated, qkv[:, 2:]), dim=1), length))

    return pytorchs, lambda: cpu.rope_attention(kernel, qkv, cos, sin, lengths, (*weights, EPS))


def random_qkv(kernel: str, length: int, num_heads: int, head_dim: int) -> tuple[torch.Tensor, np.ndarray]:
    count = max(TOKENS // length, 1)
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(count * length, 3, num_heads, head_dim, generator=generator)
    return qkv.to(compiled.KERNELS[kernel].dtype), np.full(count, length, np.int64)


def by_sequence(qkv: torch.Tensor, length: int) -> tuple[torch.Tensor, ...]:
    """Return queries, keys and values as views (sequences, num_heads, length, head_dim)."""
    return tuple(x.unflatten(0, (-1, length)).transpose(1, 2) for x in qkv.unbind(1))


def compare(pytorchs: Attend, ours: Attend) -> str:
    """Return median milliseconds of each, the median of their ratios, and the relative difference of the results."""
    seconds: list[list[float]] = [[], []]
    for _ in range(ROUNDS + 1):
        for attend, times in zip((pytorchs, ours), seconds, strict=True):
            start = time.process_time()
            attend()
            times.append(time.process_time() - start)
    theirs, own = (times[1:] for times in seconds)  # the first round warms up
    ratio = statistics.median(one / other for one, other in zip(theirs, own, strict=True))
    expected = pytorchs().transpose(1, 2).flatten(0, 1).flatten(1).double()
    difference = ((ours() - expected).norm() / expected.norm()).item()
    medians = (f"{1e3 * statistics.median(times):.1f}" for times in (theirs, own))
    return " | ".join((*medians, f"{ratio:.1f}", f"{difference:.0e}"))


if __name__ == "__main__":
    main()
