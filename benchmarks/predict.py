#!/usr/bin/env python3
"""Predict the speed on an H100 and an H200 from the launches and bytes that the rehearsal counts. Nothing is measured.

    python benchmarks/predict.py

The model: a product runs at PRODUCT_FLOPS, less the multiprocessors that its last wave of tiles leaves idle, and an
attention at its own rate; the other kernels take their bytes divided by the memory's bandwidth; the host queues a
launch in LAUNCH_SECONDS, and a pack takes as long as the slower of host and device.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from seqmill.spec.models import MODELS

LENGTH = 352  # tokens of a sequence, the mean in UniProt
BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12}
BANDWIDTH_SHARE = 0.85  # that a kernel reaches
# Of large products, by GPU: assumed, not measured. float8 with scales by rows.
PRODUCT_FLOPS = {"H100": {"float8": 1150e12}, "H200": {"float8": 1300e12}}
for gpu, flops in {"H100": 700e12, "H200": 790e12}.items():
    PRODUCT_FLOPS[gpu] |= dict.fromkeys(("bfloat16", "float16"), flops)
ATTENTION_FLOPS = 250e12  # FlashAttention 2 on sequences this short
LAUNCH_SECONDS = 4.5e-6
MULTIPROCESSORS, TILE_ROWS, TILE_COLUMNS = 132, 128, 256
PACKS = (2048, 8192, 32768)
WORDS = {"triton": "fused", "eager": "eager"}


def product_seconds(tokens: int, columns: int, depth: int, flops: float) -> float:
    tiles = math.ceil(tokens / TILE_ROWS) * math.ceil(columns / TILE_COLUMNS)
    waves = math.ceil(tiles / MULTIPROCESSORS)
    return 2 * TILE_ROWS * TILE_COLUMNS * depth * waves * MULTIPROCESSORS / flops


def pack_seconds(way: str, counted: dict[str, Any], tokens: int, gpu: str) -> tuple[float, float]:
    """Return the seconds that the host and the device need for a pack of so many tokens."""
    name, precision, *_ = way.split()
    architecture = MODELS[name]
    dim, inner, ffn = architecture.hidden_dim, architecture.inner_dim, architecture.ffn_dim
    layers, wide = architecture.num_layers, (architecture.ffn_matrices - 1) * ffn  # gate and value
    products = ((3 * inner, dim), (dim, inner), (wide, dim), (dim, ffn))
    layer = sum(product_seconds(tokens, columns, depth, PRODUCT_FLOPS[gpu][precision]) for columns, depth in products)
    layer += 4 * tokens * LENGTH * inner / ATTENTION_FLOPS
    rates = [sum(counted[part]["bytes_per_token"].values()) for part in ("layer", "pack")]
    layer_steps, pack_steps = (rate * tokens / (BANDWIDTH_SHARE * BANDWIDTHS[gpu]) for rate in rates)
    host = (layers * counted["layer"]["total"] + counted["pack"]["total"]) * LAUNCH_SECONDS
    return host, layers * (layer + layer_steps) + pack_steps


def rounded(rate: float) -> str:
    """Return a rate with three digits, as more would promise too much."""
    return f"{float(f'{rate:.3g}'):,.0f}"


def main() -> None:
    table = json.loads((ROOT / "tests/rehearsal/launches.json").read_text())
    sizes = " | ".join(f"{gpu}, {tokens:,}" for gpu in BANDWIDTHS for tokens in PACKS)
    print(f"| model | precision | steps | launches a layer | bytes a token and layer | {sizes} |")
    print("|---|---|---|---|---|" + "---|" * (len(BANDWIDTHS) * len(PACKS)))
    for way, counted in table.items():
        name, precision, _, elementwise, products = way.split()
        steps = "in products" if products == "triton" else WORDS[elementwise]
        cells = []
        for gpu in BANDWIDTHS:
            for tokens in PACKS:
                host, device = pack_seconds(way, counted, tokens, gpu)
                cells.append(f"{rounded(tokens / max(host, device))}{' (host)' if host > device else ''}")
        moved = sum(counted["layer"]["bytes_per_token"].values())
        print(f"| {name} | {precision} | {steps} | {counted['layer']['total']} | {moved:,.0f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
