"""The readout: it runs a pack through the model and pools each layer as it comes, so that no layer is kept.

Hidden states are kept only for the vectors of residues and for windows that are to be blended.
"""

from typing import NamedTuple

import numpy as np
import torch

from seqmill.embedding.pooling import poolings_of
from seqmill.model.encoder import Encoder
from seqmill.model.pack import Pack
from seqmill.spec.families import Family
from seqmill.spec.outputs import Outputs

NO_RESIDUES = torch.empty(0, 0, dtype=torch.float16)


class Vectors(NamedTuple):
    """The vectors of a pack, on the model's device.

    `rows` are float32, poolings of layers side by side; a row per segment, or per sequence if windows were blended.
    """

    rows: torch.Tensor
    residues: torch.Tensor  # (num_residues, number of layers * hidden_dim), as stored; (0, 0) if they are not kept


class Readout:
    """Reads layers of a model and pools them; `outputs` has layers from 0 on, and must suit the model's family.

    `residue_dtype` is that of the vectors of residues, None if they are not kept.
    """

    def __init__(self, family: Family, outputs: Outputs) -> None:
        self.family, self.outputs = family, outputs
        outputs.require_family(family)
        self.residue_dtype: torch.dtype | None = getattr(torch, outputs.per_residue) if outputs.per_residue else None
        self._poolings = [poolings_of(family)[name] for name in outputs.poolings]

    @torch.inference_mode()
    def __call__(self, model: Encoder, pack: Pack) -> torch.Tensor:
        """Return a row per segment: the poolings of the layers side by side, float32, on the model's device."""
        rows = {layer: self._pool(hidden, pack) for layer, hidden in model.hidden_states(pack, self.outputs.layers)}
        return torch.cat([rows[layer] for layer in self.outputs.layers], dim=1).float()

    @torch.inference_mode()
    def hidden(self, model: Encoder, pack: Pack) -> torch.Tensor:
        """Return a row per token: the layers side by side, float32."""
        states = {layer: hidden.float().clone() for layer, hidden in model.hidden_states(pack, self.outputs.layers)}
        return torch.cat([states[layer] for layer in self.outputs.layers], dim=1)

    @torch.inference_mode()
    def of_hidden(self, hidden: torch.Tensor, pack: Pack) -> Vectors:
        """Return the vectors of a pack, given its hidden states (`hidden`)."""
        layers = hidden.chunk(len(self.outputs.layers), dim=1)
        rows = torch.cat([self._pool(states.contiguous(), pack) for states in layers], dim=1)
        return Vectors(rows, self._residues(hidden, pack))

    def _residues(self, hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
        if self.residue_dtype is None:
            return NO_RESIDUES
        number, device = len(pack.lengths), hidden.device
        before, special = self.family.before, self.family.before + self.family.after  # tokens of a segment
        num_residues = len(hidden) - special * number
        # Residue j of all, in segment s, is token j + special s + before. With output_size the host need not wait for
        # the device.
        shift = torch.repeat_interleave(
            torch.arange(number, device=device), pack.cu_seqlens.diff().long() - special, output_size=num_residues
        )
        return hidden[torch.arange(num_residues, device=device) + special * shift + before].to(self.residue_dtype)

    def _pool(self, hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
        return torch.cat([pooling.of_segment(hidden, pack) for pooling in self._poolings], dim=1)

    def combine(self, rows: np.ndarray, segments: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
        """Combine rows of segments (`__call__`) into float32 (num_sequences, number of outputs * hidden_dim).

        `segments` are each sequence's first segment, and the weights of all; None if each row is that of a sequence.
        """
        if segments is None:
            if all(pooling.width == 1 for pooling in self._poolings):
                return rows
            segments = np.arange(len(rows)), np.ones(len(rows), np.int32)
        poolings = self._poolings * len(self.outputs.layers)
        widths = np.array([pooling.width for pooling in poolings])
        columns = np.split(rows, np.cumsum(widths)[:-1] * (rows.shape[1] // widths.sum()), axis=1)
        pairs = zip(poolings, columns, strict=True)
        return np.concatenate([pooling.combine(values, *segments) for pooling, values in pairs], axis=1)
