"""Every model, precision, and kernel as a case, made of fake tensors on the fake CUDA device."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from fake_cuda import DEVICE
from seqmill.embedding.embedder import PackEmbedder
from seqmill.embedding.readout import Readout
from seqmill.model.elementwise import EAGER, TRITON
from seqmill.model.encoder import Encoder
from seqmill.model.families import IMPLEMENTATIONS
from seqmill.model.float8 import FLOAT8
from seqmill.model.layers import TORCH
from seqmill.model.pack import Pack, Windows, boundaries
from seqmill.spec.families import ESM2, ESMC, Family
from seqmill.spec.models import MODELS
from seqmill.spec.outputs import Outputs

HALVES = (torch.bfloat16, torch.float16)
PRECISIONS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", FLOAT8: "float8"}


@dataclass(frozen=True)
class Way:
    """One way to compute a model on CUDA."""

    model: str
    dtype: torch.dtype
    attention: str
    elementwise: str
    products: str = TORCH

    def __str__(self) -> str:
        return f"{self.model} {PRECISIONS[self.dtype]} {self.attention} {self.elementwise} {self.products}"

    @property
    def family(self) -> Family:
        return MODELS[self.model].family

    @property
    def all_outputs(self) -> Outputs:
        """Every pooling that the family has, of the first layers."""
        cls = ("cls",) if self.family.has_cls else ()
        return Outputs((0, 1, 2), ("mean", "mean_tokens", "max", "std", *cls))

    def make(self, num_layers: int, max_tokens: int) -> Encoder:
        """Return the model with so many layers, on the device."""
        architecture = dataclasses.replace(MODELS[self.model], num_layers=num_layers)
        implementation = IMPLEMENTATIONS[self.family]
        weights = {name: torch.empty(shape) for name, shape in implementation.parameter_shapes(architecture).items()}
        products = [self.products] if self.family == ESM2 else []
        given = (architecture, weights, self.dtype, max_tokens, self.attention, self.elementwise)
        model = implementation.encoder(*given, *products)
        for module in model.modules():  # Module.to would need CUDA
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(on_device(parameter), requires_grad=False)
            module._buffers.update({name: on_device(buffer) for name, buffer in module._buffers.items()})
        return model

    def embedder(self, outputs: Outputs, num_layers: int, max_tokens: int = 6000) -> PackEmbedder:
        model = self.make(num_layers, max_tokens)
        return PackEmbedder(model, Readout(self.family, outputs), lambda: model)


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)


def all_ways() -> list[Way]:
    found = []
    for model, architecture in MODELS.items():
        packed = "varlen" if architecture.family in (ESM2, ESMC) else "triton"
        for dtype in (torch.float32, *HALVES, FLOAT8):
            if PRECISIONS[dtype] not in architecture.family.precisions:
                continue
            kernels = ("sdpa",) if packed == "varlen" and dtype == torch.float32 else ("sdpa", packed)
            found += [Way(model, dtype, kernel, step) for kernel in kernels for step in (EAGER, TRITON)]
            if architecture.family == ESM2 and dtype in HALVES:
                found.append(Way(model, dtype, packed, TRITON, TRITON))
    return found


def fake_pack(lengths: list[int], windows: Windows | None = None) -> Pack:
    counts = np.array(lengths, np.int64)
    tokens = torch.empty(sum(lengths), dtype=torch.int32, device=DEVICE)
    cu_seqlens = torch.empty(len(boundaries(counts)), dtype=torch.int32, device=DEVICE)
    return Pack(tokens, cu_seqlens, counts, 0, windows)
