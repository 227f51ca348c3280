"""Each family's implementation: its forward pass, its attention, and the reading of its weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from seqmill.model import (
    alibi,
    attention,
    dnabert_s,
    dnabert_weights,
    esm2,
    esm2_weights,
    esmc,
    esmc_weights,
    relative,
    t5,
    t5_weights,
)
from seqmill.model.tensor_files import Tensors
from seqmill.spec.architectures import Architecture
from seqmill.spec.families import DNABERT_S, ESM2, ESMC, PROSTT5, PROTT5, Family

Encoder = esm2.ESM2 | dnabert_s.DnabertS | esmc.ESMC | t5.T5Encoder
Opened = tuple[Architecture, Tensors]


@dataclass(frozen=True)
class Implementation:
    """What `encoder` and `weights` need of a family."""

    encoder: Callable[..., Encoder]  # the arguments of `esm2.ESM2`
    attention: ModuleType  # with FASTEST_FIRST, choose_kernel, and why_not
    parameter_shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    open_folder: Callable[[Path], Opened]
    open_checkpoint: Callable[[Path], Opened] | None = None


_T5 = Implementation(t5.T5Encoder, relative, t5.parameter_shapes, t5_weights.open_folder)
IMPLEMENTATIONS: dict[Family, Implementation] = {
    ESM2: Implementation(
        esm2.ESM2, attention, esm2.parameter_shapes, esm2_weights.open_folder, esm2_weights.open_checkpoint
    ),
    DNABERT_S: Implementation(dnabert_s.DnabertS, alibi, dnabert_s.parameter_shapes, dnabert_weights.open_folder),
    ESMC: Implementation(
        esmc.ESMC, attention, esmc.parameter_shapes, esmc_weights.open_folder, esmc_weights.open_checkpoint
    ),
    PROTT5: _T5,
    PROSTT5: _T5,
}
