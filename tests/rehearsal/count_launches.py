"""Count what a pack costs a GPU, with fake tensors: count_launches.py writes the counts to launches.json."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_cuda import PRODUCTS, Counted, fake_cuda
from fake_models import Way, fake_pack
from seqmill.model.elementwise import TRITON
from seqmill.model.float8 import FLOAT8
from seqmill.spec.outputs import Outputs

TABLE = Path(__file__).with_name("launches.json")
LENGTH, SEGMENTS = 352, 93  # of a pack of about 32,768 tokens; the mean length in UniProt
BF16, FP16 = torch.bfloat16, torch.float16
WAYS = [
    *(Way(f"esm2_{name}_UR50D", BF16, "varlen", TRITON) for name in ("t6_8M", "t33_650M", "t36_3B")),
    Way("esm2_t33_650M_UR50D", FP16, "varlen", TRITON),
    Way("esm2_t33_650M_UR50D", FLOAT8, "varlen", TRITON),
    Way("esm2_t33_650M_UR50D", BF16, "varlen", TRITON, TRITON),
    Way("esm2_t33_650M_UR50D", BF16, "varlen", "eager"),
    Way("esm2_t36_3B_UR50D", FLOAT8, "varlen", TRITON),
    *(Way(f"esmc_{name}", BF16, "varlen", TRITON) for name in ("300m", "600m", "6b")),
    Way("prott5_xl_u50", BF16, "triton", TRITON),
    Way("dnabert_s", BF16, "triton", TRITON),
]


def count(way: Way, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return launches, bytes, and FLOP of a layer and of the rest of a pack."""
    found: list[Counted] = []
    with fake_cuda(patch) as counted:
        for num_layers in (1, 2):
            embed = way.embedder(Outputs((num_layers,)), num_layers, max_tokens=LENGTH)
            counted.clear()
            embed(fake_pack([LENGTH] * SEGMENTS))
            found.append(Counted(counted.launches.copy(), counted.bytes.copy(), counted.flop))
    first, second = found
    layer, layer_bytes = second.launches - first.launches, second.bytes - first.bytes
    return {
        "layer": _described(layer, layer_bytes),
        "pack": _described(first.launches - layer, first.bytes - layer_bytes),
        "layer_flop_per_token": (second.flop - first.flop) // (LENGTH * SEGMENTS),
    }


def _described(launches: Counter[str], num_bytes: Counter[str]) -> dict[str, Any]:
    """The bytes of products and attention are left out: their time follows from their FLOP."""
    steps = {name: size for name, size in num_bytes.items() if name not in PRODUCTS and "attention" not in name}
    steps = {name: size for name, size in steps.items() if not name.endswith("._product")}
    tokens = LENGTH * SEGMENTS
    return {
        "launches": dict(sorted(launches.items())),
        "total": sum(launches.values()),
        "bytes_per_token": {name: round(size / tokens, 1) for name, size in sorted(steps.items())},
    }


def main() -> None:
    with pytest.MonkeyPatch.context() as patch:
        table = {str(way): count(way, patch) for way in WAYS}
    TABLE.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
