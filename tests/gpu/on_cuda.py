"""What the tests on CUDA share: packs, models, tolerances."""

import numpy as np
import pytest
import torch

from seqmill.embedding.embedder import PackEmbedder
from seqmill.embedding.readout import Readout
from seqmill.model import alibi
from seqmill.model.attention import FASTEST_FIRST, choose_kernel
from seqmill.model.esm2 import ESM2
from seqmill.model.kernels import compiled
from seqmill.model.pack import Pack
from seqmill.model.weights import untrained_tensors
from seqmill.spec.architectures import Esm2Architecture
from seqmill.spec.outputs import Outputs

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

LENGTHS = [1024, 700, 350, 350, 129, 64, 33, 16, 7, 3]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
KERNELS = [name for name in FASTEST_FIRST if name not in compiled.KERNELS]
ALIBI_KERNELS = [name for name in alibi.FASTEST_FIRST if name not in compiled.KERNELS]
# The relative error of one rounding: half a step of the dtype, and float32's own error.
HALF_STEPS = {torch.float32: 2**-22, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def cuda() -> torch.device:
    return torch.device("cuda")


def on(device: torch.device, pack: Pack) -> Pack:
    return Pack(pack.tokens.to(device), pack.cu_seqlens.to(device), pack.lengths)


def make_pack(lengths: list[int]) -> Pack:
    tokens = np.random.default_rng(5).integers(4, 24, sum(lengths)).astype(np.uint8)
    return Pack.from_tokens(tokens, np.array(lengths, np.int64))


def skip_unless_usable_with_biases(kernel: str, dtype: torch.dtype, head_dim: int) -> None:
    if reason := alibi.why_not(kernel, cuda(), dtype, head_dim):
        pytest.skip(f"{kernel}: {reason}")


def embedder(model: ESM2) -> PackEmbedder:
    return PackEmbedder(model, Readout(model.architecture.family, Outputs((len(model.layers),))), lambda: model)


def make_model(architecture: Esm2Architecture, dtype: torch.dtype, elementwise: str, max_tokens: int = 1024) -> ESM2:
    kernel = choose_kernel(cuda(), dtype, architecture.head_dim)
    return ESM2(architecture, untrained_tensors(architecture), dtype, max_tokens, kernel, elementwise).cuda()
