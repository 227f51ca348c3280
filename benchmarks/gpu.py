#!/usr/bin/env python3
"""Measure seqpack on this machine's GPU: tokens/s, model FLOP utilization, accuracy, in one table.

Needs torch, NumPy, h5py and safetensors. Seeded weights, proteins with
lengths as in UniProt, whole runs from index to shard, after one warm-up pack.

    python benchmarks/gpu.py --output benchmarks/results/gpu
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from proteins import random_proteins, write_fasta

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from seqpack.attention import choose_kernel
from seqpack.index import Index, open_index
from seqpack.index_build import LengthPolicy, build_index
from seqpack.models.esm2 import ESM2
from seqpack.models.registry import MODELS, Architecture
from seqpack.models.weights import untrained_tensors
from seqpack.runner import embed_packs

COUNTS = {
    "esm2_t6_8M_UR50D": 60000,
    "esm2_t12_35M_UR50D": 40000,
    "esm2_t30_150M_UR50D": 20000,
    "esm2_t33_650M_UR50D": 12000,
    "esm2_t36_3B_UR50D": 3000,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(COUNTS), default=tuple(COUNTS), help="which sizes")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each (default: 3)")
    parser.add_argument("--output", type=Path, required=True, help="writes OUTPUT.md and OUTPUT.json")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    results = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "gemm_bfloat16_flops": gemm_roofline(device),
        "models": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        proteins = random_proteins(max(COUNTS.values()))
        for model in arguments.models:
            index = make_index(Path(folder), model, proteins[: COUNTS[model]])
            results["models"][model] = measure(MODELS[model], index, device, arguments.rounds)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
            arguments.output.with_suffix(".md").write_text(table(results))
            print(table(results), flush=True)


def make_index(folder: Path, model: str, sequences: list[str]) -> Index:
    write_fasta(folder / "proteins.faa", sequences)
    build_index(folder / "proteins.faa", folder / f"{model}.h5", f"untrained:{model}", LengthPolicy())
    return open_index(folder / f"{model}.h5")


def measure(architecture: Architecture, index: Index, device: torch.device, rounds: int) -> dict:
    """Time all packs of the index in bfloat16, and compare a few with float32."""
    tensors = untrained_tensors(architecture)
    kernel = choose_kernel(device, torch.bfloat16, architecture.head_dim)
    model = ESM2(architecture, tensors, torch.bfloat16, index.max_tokens, kernel).to(device)
    packs = range(index.num_packs)
    list(embed_packs(model, index, packs[:2], device, threads=1))
    torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in embed_packs(model, index, packs, device, threads=1):
            pass
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device)
    checked = [index.num_packs // 2, index.num_packs - 1]
    found = np.concatenate(list(embed_packs(model, index, checked, device, threads=1)))
    del model
    exact = ESM2(architecture, tensors, torch.float32, index.max_tokens).to(device)
    expected = np.concatenate(list(embed_packs(exact, index, checked, device, threads=1)))
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    lengths = np.diff(index.token_offsets).astype(float)
    layers, dim = architecture.num_layers, architecture.hidden_dim
    return {
        "attention": kernel,
        "tokens": int(lengths.sum()),
        "flop": float((lengths * (24 * layers * dim**2 + 4 * lengths * dim * layers)).sum()),
        "seconds": seconds,
        "peak_bytes": peak,
        "worst_cosine_to_float32": float(cosines.min()),
    }


def gemm_roofline(device: torch.device) -> float:
    """Return FLOP/s of a large bfloat16 matrix product."""
    x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    rates = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        x @ x
        end.record()
        end.synchronize()
        rates.append(2 * 8192**3 / (start.elapsed_time(end) / 1e3))
    return max(rates)


def table(results: dict) -> str:
    """Return the results in Markdown: medians over the rounds."""
    lines = [
        f"{results['device']}, torch {results['torch']}, {results['date']}; "
        f"bfloat16 GEMM {results['gemm_bfloat16_flops'] / 1e12:.0f} TFLOP/s. Index to embeddings, real tokens.",
        "",
        "| model | attention | tokens/s | of GEMM peak | GPU memory | worst cosine to float32 |",
        "|---|---|---|---|---|---|",
    ]
    for name, measured in results["models"].items():
        seconds = statistics.median(measured["seconds"])
        share = measured["flop"] / seconds / results["gemm_bfloat16_flops"]
        lines.append(
            f"| {name} | {measured['attention']} | {measured['tokens'] / seconds:,.0f} | {share:.0%} "
            f"| {measured['peak_bytes'] / 1e9:.1f} GB | {measured['worst_cosine_to_float32']:.6f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
