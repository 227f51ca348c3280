"""The readout: a pack through the model, its layers pooled as they come, so that none of them is kept."""

from __future__ import annotations

import numpy as np
import torch

from seqpack.models.encoders import Encoder
from seqpack.outputs import Outputs
from seqpack.packs import Pack
from seqpack.pooling import BY_NAME
from seqpack.windows import blend


class Readout:
    """Reads layers of a model and pools them.

    Args:
        family: of the model.
        outputs: layers, from 0 on, and poolings.
    """

    def __init__(self, family: str, outputs: Outputs) -> None:
        self.outputs = outputs
        self._poolings = [BY_NAME[family][name] for name in outputs.poolings]

    @torch.inference_mode()
    def __call__(self, model: Encoder, pack: Pack) -> torch.Tensor:
        """Return a row a segment: the poolings of the layers side by side, float32, on the model's device."""
        rows = {layer: self._pool(hidden, pack) for layer, hidden in model.hidden_states(pack, self.outputs.layers)}
        return torch.cat([rows[layer] for layer in self.outputs.layers], dim=1).float()

    @torch.inference_mode()
    def hidden(self, model: Encoder, pack: Pack) -> torch.Tensor:
        """Return a row a token: the layers side by side, float32."""
        states = {layer: hidden.float().clone() for layer, hidden in model.hidden_states(pack, self.outputs.layers)}
        return torch.cat([states[layer] for layer in self.outputs.layers], dim=1)

    @torch.inference_mode()
    def of_windows(self, hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
        """Return a row a sequence, of the hidden states (`hidden`) of a pack of windows."""
        blended, sequences = blend(hidden, pack)
        layers = blended.chunk(len(self.outputs.layers), dim=1)
        return torch.cat([self._pool(states.contiguous(), sequences) for states in layers], dim=1)

    def _pool(self, hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
        return torch.cat([pooling.of_segment(hidden, pack) for pooling in self._poolings], dim=1)

    def combine(self, rows: np.ndarray, segments: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
        """Return a row a sequence, of rows of segments.

        Args:
            rows: float32 (num_segments, any width), as `__call__` gives them.
            segments: where each sequence's segments begin, and the weights of all; None if each row is a sequence's.

        Returns:
            float32 (num_sequences, number of outputs * hidden_dim).
        """
        if segments is None:
            if all(pooling.width == 1 for pooling in self._poolings):
                return rows
            segments = np.arange(len(rows)), np.ones(len(rows), np.int32)
        dim = rows.shape[1] // (len(self.outputs.layers) * sum(pooling.width for pooling in self._poolings))
        combined, begin = [], 0
        for pooling in self._poolings * len(self.outputs.layers):
            end = begin + pooling.width * dim
            combined.append(pooling.combine(rows[:, begin:end], *segments))
            begin = end
        return np.concatenate(combined, axis=1)
