"""The limits of this processor: matrix products at a model's shapes, and multiply-add instructions."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from seqmill.model.kernels.build import find_compiler
from seqmill.model.layers import Linear

ROWS = 4096  # tokens
TRIALS = 20


def product_rates(hidden_dim: int, ffn_dim: int) -> dict[str, float]:
    """Return the FLOP/s of a model's largest matrix product in each precision, on all cores at once.

    int8 is `torch._int_mm`; it is left out where PyTorch can't compute it.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    x, weight = torch.randn(ROWS, hidden_dim), torch.randn(ffn_dim, hidden_dim)
    flop = 2.0 * ROWS * hidden_dim * ffn_dim

    def linear(dtype: torch.dtype) -> Callable[[], object]:
        layer, rows = Linear({"weight": weight}, "", dtype), x.to(dtype)
        layer.pack()
        return lambda: layer(rows)

    small = torch.randint(-100, 100, (ROWS, hidden_dim), dtype=torch.int8)
    small_weight = torch.randint(-100, 100, (ffn_dim, hidden_dim), dtype=torch.int8).T
    products: dict[str, Callable[[], object]] = {
        "float32": linear(torch.float32),
        "bfloat16": linear(torch.bfloat16),
        "int8": lambda: torch._int_mm(small, small_weight),
    }
    rates = {}
    for name, product in products.items():
        try:
            rates[name] = flop / min(_seconds(product) for _ in range(TRIALS))
        except RuntimeError:  # not on this processor
            continue
    return rates


def instruction_rates(folder: Path) -> dict[str, float]:
    """Return the FLOP/s of one core with nothing but multiply-add instructions; empty without a C compiler."""
    compiler = find_compiler()
    if compiler is None:
        return {}
    source, program = Path(__file__).with_name("instruction_rates.c"), folder / "instruction_rates"
    subprocess.run([compiler, "-O3", "-march=native", str(source), "-o", str(program)], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {name: float(rate) for name, rate in (line.split("\t") for line in printed.splitlines())}


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
