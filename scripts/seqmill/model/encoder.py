"""The encoder of either model family, on a device and with its fastest kernels."""

import torch

from seqmill.model import alibi, attention
from seqmill.model.dnabert_s import DnabertS
from seqmill.model.elementwise import choose_elementwise
from seqmill.model.esm2 import ESM2
from seqmill.model.weights import Weights
from seqmill.spec.models import DnabertArchitecture
from seqmill.spec.task import AUTO

Encoder = ESM2 | DnabertS


def make_encoder(
    weights: Weights, dtype: torch.dtype, max_tokens: int, device: torch.device, requested: str = AUTO
) -> Encoder:
    """Return the model on a device.

    Args:
        weights: of either family.
        dtype: of the matrix products.
        max_tokens: tokens in the longest segment that the model will see.
        device: cpu or cuda.
        requested: the attention kernel's name, or auto for the fastest.

    Raises:
        SeqmillError: the kernel can't be used; the message says why.
    """
    architecture = weights.architecture
    elementwise = choose_elementwise(device, dtype, (architecture.hidden_dim, architecture.ffn_dim))
    if isinstance(architecture, DnabertArchitecture):
        kernel = alibi.choose_kernel(device, dtype, architecture.head_dim, requested)
        return DnabertS(architecture, weights.tensors, dtype, max_tokens, kernel, elementwise).to(device)
    kernel = attention.choose_kernel(device, dtype, architecture.head_dim, requested)
    return ESM2(architecture, weights.tensors, dtype, max_tokens, kernel, elementwise).to(device)
