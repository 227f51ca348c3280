#!/usr/bin/env python3
"""Measure the error of 16-bit residual streams, layer norms, and matrix products, with and without outlier channels.

python benchmarks/outliers.py --output benchmarks/results/outliers.md
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("scripts", "tests/support")]

from reference import fair_esm_model, one_pack, plant_outliers, save_checkpoint
from seqmill.base.machine import processor
from seqmill.embedding.pooling import mean_over_residues
from seqmill.model.attention import attend
from seqmill.model.esm2 import ESM2, LAYER_NORM_EPS, TOKEN_DROPOUT_SCALE, rope_tables
from seqmill.model.pack import Pack
from seqmill.model.weights import Weights, load_weights
from seqmill.spec.models import MODELS, find_model
from sequences import random_sequences

NAMES = ("esm2_t6_8M_UR50D", "esm2_t12_35M_UR50D")
LENGTHS = [700] + 3 * [350] + 4 * [128] + 4 * [64] + 4 * [30] + [10, 10, 3, 1]

Norm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the Markdown file to write")
    output = parser.parse_args().output
    pack = one_pack(random_sequences(LENGTHS))
    columns = {}
    for name, planted in itertools.product(NAMES, (False, True)):
        columns[f"{name.split('_')[2]}{', outliers' * planted}"] = measure(seeded_weights(name, planted), pack)
    lines = [
        f"{processor()[0]}, torch {torch.__version__}, {date.today().isoformat()}, on the CPU. Made by",
        "",
        "    python benchmarks/outliers.py --output benchmarks/results/outliers.md",
        "",
        f"Mean embeddings of {len(LENGTHS)} sequences of 1 to {max(LENGTHS)} residues against float32 (float32 itself",
        "against float64): one minus the worst cosine / the worst relative L2 error. Seeded weights, without outliers",
        "and with four channels that reach 1e3 to 8e3 in the residual stream (`plant_outliers`).",
        "seqmill's rows are those with residual stream and layer norm in float32. 'In and out' is what a model",
        "converted to 16 bits does (float32 only within PyTorch's norm); 'every step' also rounds each result in it.",
        "",
        *table(columns),
    ]
    output.write_text("\n".join(lines) + "\n")
    print(output.read_text())


def seeded_weights(name: str, planted: bool) -> Weights:
    model = fair_esm_model(MODELS[name])
    if planted:
        plant_outliers(model)
    with tempfile.TemporaryDirectory() as folder:
        return load_weights(find_model(str(save_checkpoint(model, Path(folder, "model.pt")))))


def norm_float32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return F.layer_norm(x.float(), weight.shape, weight, bias, LAYER_NORM_EPS).to(dtype)


def norm_rounded(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Normalize as a model converted to 16 bits does: round input, weights, and output; float32 in PyTorch's kernel."""
    return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), LAYER_NORM_EPS)


def norm_16_bit(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Normalize with the result of every step rounded to 16 bits."""
    x = x.to(dtype)
    centered = x - x.mean(dim=-1, keepdim=True)
    variance = centered.square().mean(dim=-1, keepdim=True)
    return centered * torch.rsqrt(variance + LAYER_NORM_EPS) * weight.to(dtype) + bias.to(dtype)


NORMS: dict[str, Norm] = {
    "float32": norm_float32,
    "16-bit in and out": norm_rounded,
    "16-bit every step": norm_16_bit,
}
# Matrix products, and the residual streams that make sense with them.
STREAMS = {
    torch.bfloat16: (torch.float32, torch.bfloat16),
    torch.float16: (torch.float32, torch.bfloat16, torch.float16),
}
VARIANTS = [(matmul, stream, norm) for matmul, streams in STREAMS.items() for norm in NORMS for stream in streams]


@torch.inference_mode()
def forward(weights: Weights, pack: Pack, matmul: torch.dtype, stream: torch.dtype, norm: str) -> torch.Tensor:
    """Run ESM-2's forward pass, written again with the precisions as switches; return float32 hidden states."""
    architecture, tensors = weights.architecture, weights.tensors
    cos, sin = rope_tables(int(pack.lengths.max()), architecture.head_dim, torch.float32)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, tensors[f"{name}.weight"].to(matmul), tensors[f"{name}.bias"].to(matmul))

    def normalize(x: torch.Tensor, name: str) -> torch.Tensor:
        return NORMS[norm](x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], matmul)

    def add(x: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        return (x.float() + update.float()).to(stream)

    x = (F.embedding(pack.tokens.int(), tensors["embed.weight"]) * TOKEN_DROPOUT_SCALE).to(stream)
    for number in range(architecture.num_layers):
        layer = f"layers.{number}"
        qkv = linear(normalize(x, f"{layer}.attention_norm"), f"{layer}.qkv")
        qkv = qkv.view(-1, 3, architecture.num_heads, architecture.head_dim)
        x = add(x, linear(attend("sdpa", qkv, cos, sin, pack), f"{layer}.out"))
        x = add(x, linear(F.gelu(linear(normalize(x, f"{layer}.ffn_norm"), f"{layer}.fc1")), f"{layer}.fc2"))
    # Nothing after the last norm needs 16 bits, so its float32 result is not rounded.
    last = torch.float32 if norm == "float32" else matmul
    return NORMS[norm](x, tensors["final_norm.weight"], tensors["final_norm.bias"], last).float()


def measure(weights: Weights, pack: Pack) -> list[tuple[float, float]]:
    """Return the worst cosine and the worst relative L2 error of float32, then of each of the `VARIANTS`."""

    def ours(dtype: torch.dtype) -> torch.Tensor:
        return ESM2(weights.architecture, weights.tensors, dtype, int(pack.lengths.max()))(pack)

    def means(hidden: torch.Tensor) -> torch.Tensor:
        return mean_over_residues(hidden, pack)

    expected = means(ours(torch.float32))
    found = [worst(expected, means(ours(torch.float64)))]
    for matmul, stream, norm in VARIANTS:
        hidden = forward(weights, pack, matmul, stream, norm)
        if stream == torch.float32 and norm == "float32" and not torch.equal(hidden, ours(matmul)):
            raise AssertionError(f"the forward written out here is not seqmill's in {matmul}")
        found.append(worst(means(hidden), expected))
    return found


def worst(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    found, expected = found.double(), expected.double()
    cosines = F.cosine_similarity(found, expected, dim=1)
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    return cosines.min().item(), errors.max().item()


def table(columns: dict[str, list[tuple[float, float]]]) -> list[str]:
    def short(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    rows = [("float32", "float32", "float32"), *((short(m), short(s), norm) for m, s, norm in VARIANTS)]
    head = ["matrix products", "residual stream", "layer norm", *columns]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for number, row in enumerate(rows):
        cells = [f"{1 - column[number][0]:.1e} / {column[number][1]:.1e}" for column in columns.values()]
        lines.append(f"| {' | '.join((*row, *cells))} |")
    return lines


if __name__ == "__main__":
    main()
