"""Outlier channels in the inputs of matrix products, which decide how coarsely float8 rounds the other channels."""

import torch

from seqmill.spec.architectures import Architecture, DnabertArchitecture

CHANNELS = [3, 17, 30, 41]


def plant_product_outliers(
    architecture: Architecture, weights: dict[str, torch.Tensor], factor: float
) -> dict[str, torch.Tensor]:
    """Return weights of the same function, with four channels of inputs of products `factor` times as large.

    The columns that read such a channel are smaller by the factor, so in exact arithmetic nothing changes. Chosen are
    ESM-2's layer norms, DNABERT-S's gated products (its layer norms also write to the residual stream), and the
    values of attention in both.
    """
    planted = {name: tensor.clone() for name, tensor in weights.items()}
    for layer in range(architecture.num_layers):
        prefix = f"layers.{layer}."

        def scale(writer: str, offset: int, reader: str, prefix: str = prefix) -> None:
            rows = [offset + channel for channel in CHANNELS]
            for name in (f"{prefix}{writer}.weight", f"{prefix}{writer}.bias"):
                if name in planted:
                    planted[name][rows] *= factor
            planted[f"{prefix}{reader}.weight"][:, CHANNELS] /= factor

        scale("qkv", 2 * architecture.hidden_dim, "out")
        if isinstance(architecture, DnabertArchitecture):
            scale("gated", architecture.ffn_dim, "down")
        else:
            scale("attention_norm", 0, "qkv")
            scale("ffn_norm", 0, "fc1")
    return planted
