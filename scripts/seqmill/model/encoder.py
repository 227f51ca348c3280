"""The encoder of any model family, on a device and with its fastest kernels."""

import torch

from seqmill.errors import SeqmillError
from seqmill.model.elementwise import choose_elementwise
from seqmill.model.families import IMPLEMENTATIONS
from seqmill.model.families import Encoder as Encoder
from seqmill.model.float8 import FLOAT8, MULTIPLE, activations_dtype
from seqmill.model.kernels import compiled
from seqmill.model.layers import Linear
from seqmill.model.weights import Weights
from seqmill.spec.architectures import Architecture
from seqmill.spec.task import AUTO


def make_encoder(
    weights: Weights, dtype: torch.dtype, max_tokens: int, device: torch.device, requested: str = AUTO
) -> Encoder:
    """Return the model on a device.

    Args:
        weights: of any family.
        dtype: of the matrix products.
        max_tokens: tokens in the longest segment that the model will see.
        device: cpu or cuda.
        requested: the attention kernel's name, or auto for the fastest.

    Raises:
        SeqmillError: the kernel can't be used, or float8 for this architecture; the message says why.
    """
    architecture = weights.architecture
    dims = architecture.hidden_dim, architecture.ffn_dim
    if dtype == FLOAT8 and any(dim % MULTIPLE for dim in dims):
        widths = " and ".join(map(str, dims))
        raise SeqmillError(
            f"precision float8 needs widths that are multiples of {MULTIPLE}, and the model's are {widths}; "
            "use precision bfloat16"
        )
    elementwise = choose_elementwise(device, dtype, dims)
    family = IMPLEMENTATIONS[architecture.family]
    kernel = family.attention.choose_kernel(device, activations_dtype(dtype), architecture.head_dim, requested)
    model = family.encoder(architecture, weights.tensors, dtype, max_tokens, kernel, elementwise)
    if device.type == "cpu":
        pack_weights(model)
    return model.to(device)


def pack_weights(model: Encoder) -> None:
    """Arrange a model's weights for products on a CPU, once and not in every product."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack()


def faster_kernels(
    architecture: Architecture, dtype: torch.dtype, device: torch.device, kernel: str
) -> list[tuple[str, str]]:
    """Return the attention kernels that this machine's processor could run and that are faster than the given one.

    With each comes the reason why it can't be used now; empty if it can.
    """
    dtype = activations_dtype(dtype)
    family = IMPLEMENTATIONS[architecture.family].attention
    faster = family.FASTEST_FIRST[: family.FASTEST_FIRST.index(kernel)]
    ours = [name for name in faster if name in compiled.KERNELS and compiled.KERNELS[name].dtype == dtype]
    return [
        (name, family.why_not(name, device, dtype, architecture.head_dim))
        for name in ours
        if device.type == "cpu" and not compiled.missing_features(name)
    ]
