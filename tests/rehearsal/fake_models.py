"""Every model, precision, and kernel as a case, made of fake tensors on the fake CUDA device."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from fake_cuda import DEVICE
from seqmill.embedding.embedder import PackEmbedder
from seqmill.embedding.readout import Readout
from seqmill.model import dnabert_s, esm2
from seqmill.model.dnabert_s import DnabertS
from seqmill.model.elementwise import EAGER, TRITON
from seqmill.model.encoder import Encoder
from seqmill.model.esm2 import ESM2
from seqmill.model.float8 import FLOAT8
from seqmill.model.layers import TORCH
from seqmill.model.pack import Pack, Windows, boundaries
from seqmill.spec.models import DNABERT_MODELS, MODELS, Architecture
from seqmill.spec.outputs import Outputs

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Way:
    """One way to compute a model on CUDA."""

    model: str
    dtype: torch.dtype
    attention: str
    elementwise: str
    products: str = TORCH

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.").removesuffix("_e4m3fn")
        return f"{self.model} {kind} {self.attention} {self.elementwise} {self.products}"

    @property
    def family(self) -> str:
        return "dnabert_s" if self.model in DNABERT_MODELS else "esm2"

    def make(self, num_layers: int, max_tokens: int) -> Encoder:
        """Return the model with so many layers, on the device."""
        whole: Architecture = DNABERT_MODELS.get(self.model) or MODELS[self.model]
        architecture = dataclasses.replace(whole, num_layers=num_layers)
        shapes = (dnabert_s if self.family == "dnabert_s" else esm2).parameter_shapes(architecture)
        weights = {name: torch.empty(shape, device=DEVICE) for name, shape in shapes.items()}
        given = (architecture, weights, self.dtype, max_tokens, self.attention, self.elementwise)
        model: Encoder = DnabertS(*given) if self.family == "dnabert_s" else ESM2(*given, self.products)
        for name, buffer in [*model.named_buffers()]:  # Module.to would need CUDA
            model._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)
        return model

    def embedder(self, outputs: Outputs, num_layers: int, max_tokens: int = 6000) -> PackEmbedder:
        model = self.make(num_layers, max_tokens)
        return PackEmbedder(model, Readout(self.family, outputs), lambda: model)


def all_ways() -> list[Way]:
    found = []
    for model in (*MODELS, *DNABERT_MODELS):
        packed = "triton" if model in DNABERT_MODELS else "varlen"
        for dtype in (torch.float32, *HALVES, FLOAT8):
            kernels = ("sdpa",) if packed == "varlen" and dtype == torch.float32 else ("sdpa", packed)
            found += [Way(model, dtype, kernel, step) for kernel in kernels for step in (EAGER, TRITON)]
            if model in MODELS and dtype in HALVES:
                found.append(Way(model, dtype, packed, TRITON, TRITON))
    return found


def fake_pack(lengths: list[int], windows: Windows | None = None) -> Pack:
    counts = np.array(lengths, np.int64)
    tokens = torch.empty(sum(lengths), dtype=torch.int32, device=DEVICE)
    cu_seqlens = torch.empty(len(boundaries(counts)), dtype=torch.int32, device=DEVICE)
    return Pack(tokens, cu_seqlens, counts, 0, windows)
