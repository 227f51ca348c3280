#!/usr/bin/env python3
"""Measure how precisions change ProtT5's mean embeddings, and when its feed-forward overflows in float16.

python benchmarks/t5_precision.py --output benchmarks/results/t5_precision.md
"""

import argparse
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("scripts", "tests/support")]

from pack_parity import make_model, one_pack
from seqmill.base.machine import processor
from seqmill.embedding.pooling import mean_over_residues
from seqmill.model.kernels import compiled
from seqmill.model.layers import Linear
from seqmill.model.pack import Pack
from seqmill.model.weights import Weights, load_weights
from seqmill.spec.architectures import T5Architecture
from seqmill.spec.models import ModelSource
from t5_reference import random_tokens, save_folder, seeded_state

LENGTHS = [350, 128, 128, 64, 64, 64, 30, 30, 30, 10, 3, 1]
SHAPES = {
    "24 layers, 256 wide": T5Architecture(24, 256, 8, key_dim=32, feed_forward_dim=4096),
    "2 layers of ProtT5's width": T5Architecture(2),
}
LARGEST = torch.finfo(torch.float16).max
ERRORS = """\
Mean embeddings of 12 sequences of 1 to 350 residues against float64: the worst cosine / the worst and the median
relative L2 error. **Seeded weights, not trained ones.** Rounded means: the mean is stored as float16, as UniProt's
vectors are. Weights in float16: only the weights are rounded, as those of the published half-precision encoder are;
the arithmetic is in float32.
"""
OVERFLOW = """
Four hidden units of each feed-forward made larger by a factor, and their columns of the second product smaller, which
changes nothing in exact arithmetic; then four channels of the second product's output made larger, which the next norm
sees. The largest absolute value of a product's output, as a multiple of 65,504, and how many of the 12 mean embeddings
are finite. 24 layers, 256 wide.
"""
CHANNELS, FACTORS = [3, 17, 30, 41], [1, 1e3, 1e4, 3e4, 1e5]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the Markdown file to write")
    output = parser.parse_args().output
    pack = one_pack(random_tokens(LENGTHS))
    shapes = {name: seeded_weights(shape, output.parent / ".t5_precision") for name, shape in SHAPES.items()}
    lines = [
        f"{processor()[0]}, torch {torch.__version__}, {date.today().isoformat()}, on the CPU. Made by",
        "",
        "    python benchmarks/t5_precision.py --output benchmarks/results/t5_precision.md",
        "",
        ERRORS,
        *errors_table(shapes, pack),
        OVERFLOW,
        *overflow_table(shapes["24 layers, 256 wide"], pack),
    ]
    output.write_text("\n".join(lines) + "\n")
    print(output.read_text())


def seeded_weights(architecture: T5Architecture, folder: Path) -> Weights:
    save_folder(folder, architecture, seeded_state(architecture))
    weights = load_weights(ModelSource(str(folder), "folder", None, folder, architecture.family))
    tensors = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return Weights(architecture, tensors, "", True)


def means(weights: Weights, pack: Pack, dtype: torch.dtype) -> torch.Tensor:
    family, kernel = weights.architecture.family, compiled.of_dtype(dtype) or "sdpa"
    hidden = make_model(weights, dtype, int(pack.lengths.max()), kernel)(pack)
    return mean_over_residues(hidden, pack, family.before, family.after)


def errors_table(shapes: dict[str, Weights], pack: Pack) -> list[str]:
    def rounded(dtype: torch.dtype) -> Callable[[Weights], torch.Tensor]:
        return lambda weights: means(weights, pack, dtype).half()

    def in_float16(weights: Weights) -> torch.Tensor:
        halves = {name: tensor.half().float() for name, tensor in weights.tensors.items()}
        return means(Weights(weights.architecture, halves, "", True), pack, torch.float32)

    rows: dict[str, Callable[[Weights], torch.Tensor]] = {
        "float32": lambda weights: means(weights, pack, torch.float32),
        "float32, rounded means": rounded(torch.float32),
        "float32, weights in float16": in_float16,
        "bfloat16": lambda weights: means(weights, pack, torch.bfloat16),
        "bfloat16, rounded means": rounded(torch.bfloat16),
        "float16 (which seqmill refuses)": lambda weights: means(weights, pack, torch.float16),
    }
    exact = {name: means(weights, pack, torch.float64) for name, weights in shapes.items()}
    lines = [f"| | {' | '.join(shapes)} |", f"|---|{'---|' * len(shapes)}"]
    for row, compute in rows.items():
        cells = []
        for name, weights in shapes.items():
            found = compute(weights).double()
            errors = (found - exact[name]).norm(dim=1) / exact[name].norm(dim=1)
            cosine = torch.cosine_similarity(found, exact[name]).min()
            cells.append(f"{cosine:.7f} / {errors.max():.1e}, {errors.median():.1e}")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def overflow_table(weights: Weights, pack: Pack) -> list[str]:
    lines = ["| larger | factor | largest / 65,504 | finite in float16 | in bfloat16 |", "|---|---|---|---|---|"]
    for place in ("hidden units", "output"):
        for factor in FACTORS:
            planted = plant(weights, place, factor)
            finite = [
                int(means(planted, pack, dtype).isfinite().all(dim=1).sum())
                for dtype in (torch.float16, torch.bfloat16)
            ]
            share = largest_product(planted, pack) / LARGEST
            lines.append(f"| {place} | {factor:,.0f} | {share:.2g} | {finite[0]} | {finite[1]} |")
    return lines


def plant(weights: Weights, place: str, factor: float) -> Weights:
    planted = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    for layer in range(weights.architecture.num_layers):
        if place == "hidden units":
            planted[f"layers.{layer}.up.weight"][CHANNELS] *= factor
            planted[f"layers.{layer}.down.weight"][:, CHANNELS] /= factor
        else:
            planted[f"layers.{layer}.down.weight"][CHANNELS] *= factor
    return Weights(weights.architecture, planted, "", True)


def largest_product(weights: Weights, pack: Pack) -> float:
    """Return the largest absolute value that a matrix product gives in float32."""
    largest = [0.0]
    model = make_model(weights, torch.float32, int(pack.lengths.max()), "sdpa")
    for module in model.modules():
        if isinstance(module, Linear):
            module.register_forward_hook(lambda _, __, found: largest.append(found.abs().max().item()))
    model(pack)
    return max(largest)


if __name__ == "__main__":
    main()
