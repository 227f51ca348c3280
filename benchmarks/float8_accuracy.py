#!/usr/bin/env python3
"""Measure the error of float8, emulated on the CPU, with seeded weights and with outlier channels planted in them.

python benchmarks/float8_accuracy.py --output benchmarks/results/float8.md
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("scripts", "tests/support")]

from outliers import LENGTHS, seeded_weights

from product_outliers import plant_product_outliers
from reference import one_pack
from seqmill.base.machine import processor
from seqmill.embedding.pooling import mean_over_residues, mean_over_tokens
from seqmill.model.dnabert_s import DnabertS
from seqmill.model.esm2 import ESM2
from seqmill.model.float8 import FLOAT8
from seqmill.model.pack import Pack
from seqmill.model.weights import untrained_tensors
from seqmill.spec.architectures import Architecture, DnabertArchitecture, Esm2Architecture
from seqmill.spec.models import DNABERT_MODELS, MODELS
from sequences import random_sequences

# Layers of each model; of the large ones a few, with fewer sequences.
LAYERS = {
    "esm2_t6_8M_UR50D": 6,
    "esm2_t12_35M_UR50D": 12,
    "esm2_t30_150M_UR50D": 30,
    "esm2_t33_650M_UR50D": 8,
    "esm2_t36_3B_UR50D": 4,
    "dnabert_s": 12,
}
FEW = [350, 128, 64, 30, 10, 3, 1]
SHORT_TOKENS = 32  # sequences with fewer are shown apart: over them few errors average out
FACTORS = (1000, 30_000, 1_000_000)  # of outliers in the inputs of products


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the Markdown file to write")
    parser.add_argument("--models", nargs="+", choices=LAYERS, default=list(LAYERS), help="the models (default: all)")
    options = parser.parse_args()
    lines = []
    for name in options.models:
        rows = rows_of(name)
        print("\n".join(rows), flush=True)
        lines += rows
    head = [
        f"{processor()[0]}, torch {torch.__version__}, {date.today().isoformat()}, emulated on the CPU. Made by",
        "",
        "    python benchmarks/float8_accuracy.py --output benchmarks/results/float8.md",
        "",
        "Mean embeddings against float32: the worst cosine / the worst relative L2 error. Seeded weights; `stream`:",
        "with four channels that reach 1e3 to 8e3 in the residual stream (`plant_outliers`); `products xN`: with four",
        "channels of the inputs of products N times as large (`plant_product_outliers`). Short sequences have fewer",
        f"than {SHORT_TOKENS} tokens, down to 3.",
        "",
        "| model | layers | outliers | bfloat16 | float8 | float8, short |",
        "|---|---|---|---|---|---|",
    ]
    options.output.write_text("\n".join(head + lines) + "\n")


def rows_of(name: str) -> list[str]:
    """Return the table's rows of a model."""
    architecture: Architecture
    if name in DNABERT_MODELS:
        architecture, in_all = DNABERT_MODELS[name], DNABERT_MODELS[name].num_layers
        lengths = np.array(LENGTHS) + 2
        tokens = np.random.default_rng(3).integers(5, architecture.vocabulary, lengths.sum()).astype(np.uint16)
        pack = Pack.from_tokens(tokens, lengths)
    else:
        architecture, in_all = replace(MODELS[name], num_layers=LAYERS[name]), MODELS[name].num_layers
        pack = one_pack(random_sequences(FEW if architecture.hidden_dim >= 1280 else LENGTHS))
    rows = []
    short = torch.from_numpy(pack.lengths < SHORT_TOKENS)
    for kind, weights in cases_of(name, architecture):
        bfloat16, float8 = measure(architecture, weights, pack)
        cells = [worst(bfloat16), worst(float8[~short]), worst(float8[short])]
        rows.append(f"| {name} | {LAYERS[name]} of {in_all} | {kind} | {' | '.join(cells)} |")
    return rows


def cases_of(name: str, architecture: Architecture) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield kinds of outliers and weights with them."""
    weights = untrained_tensors(architecture)
    yield "none", weights
    if isinstance(architecture, Esm2Architecture) and architecture.hidden_dim < 1280:
        yield "stream", seeded_weights(name, planted=True).tensors
    for factor in FACTORS:
        yield f"products x{factor:,}", plant_product_outliers(architecture, weights, factor)


def measure(architecture: Architecture, weights: dict[str, torch.Tensor], pack: Pack) -> list[torch.Tensor]:
    """Return cosine and relative L2 error of each mean (sequences, 2), in bfloat16 and in float8, against float32."""
    model, pool = (
        (DnabertS, mean_over_tokens) if isinstance(architecture, DnabertArchitecture) else (ESM2, mean_over_residues)
    )
    longest = int(pack.lengths.max())
    exact, *others = (
        pool(model(architecture, weights, dtype, longest)(pack), pack).double()
        for dtype in (torch.float32, torch.bfloat16, FLOAT8)
    )
    return [
        torch.stack((F.cosine_similarity(found, exact), (found - exact).norm(dim=1) / exact.norm(dim=1)), dim=1)
        for found in others
    ]


def worst(errors: torch.Tensor) -> str:
    return f"{errors[:, 0].min().item():.4f} / {errors[:, 1].max().item():.3f}"


if __name__ == "__main__":
    main()
