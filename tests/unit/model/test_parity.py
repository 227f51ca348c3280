"""The forward pass agrees with fair-esm 2.0.0 on the same weights, one unpadded sequence at a time."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reference import fair_esm_hidden, fair_esm_model, save_checkpoint, worst_errors
from seqmill.model.kernels import compiled
from seqmill.spec.models import MODELS
from sequences import random_sequences

LENGTHS = [1022, 350, 350, 128, 64, 64, 17, 3, 2, 1, 1]
SHORT_LENGTHS = [1022, 90, 90, 5, 1]

# All layers if memory and time allow; a few of the identical layers for the large models.
CASES = {
    "esm2_t6_8M_UR50D": (6, SHORT_LENGTHS),
    "esm2_t12_35M_UR50D": (12, LENGTHS),
    "esm2_t30_150M_UR50D": (30, SHORT_LENGTHS),
    "esm2_t33_650M_UR50D": (4, SHORT_LENGTHS),
    "esm2_t36_3B_UR50D": (2, SHORT_LENGTHS),
    "esm2_t48_15B_UR50D": (1, [1022, 5, 1]),
}


QUICK = "esm2_t6_8M_UR50D"


def usable_kernels(dtype: torch.dtype) -> list[str]:
    """Return our own kernels for a dtype that this machine can run."""
    return [name for name, kernel in compiled.KERNELS.items() if kernel.dtype == dtype and not compiled.why_not(name)]


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.full) for name in CASES]
)
def test_every_architecture_agrees_with_fair_esm(name: str, tmp_path: Path) -> None:
    num_layers, lengths = CASES[name]
    reference = fair_esm_model(replace(MODELS[name], num_layers=num_layers))
    checkpoint = save_checkpoint(reference, tmp_path / "model.pt")
    sequences = random_sequences(lengths)
    expected = [fair_esm_hidden(reference, sequence) for sequence in sequences]

    for kernel in ("sdpa", *usable_kernels(torch.float32)):
        hidden, mean, _ = worst_errors(expected, checkpoint, sequences, torch.float32, kernel)
        print(f"{name} float32 {kernel}: hidden {hidden:.2e}, mean {mean:.2e}")
        assert hidden < 5e-5
        assert mean < 5e-5

    for kernel in ("sdpa", *usable_kernels(torch.bfloat16)):
        _, _, cosine = worst_errors(expected, checkpoint, sequences, torch.bfloat16, kernel)
        print(f"{name} bfloat16 {kernel}: worst cosine {cosine:.7f}")
        assert cosine > 0.9999

    if name == "esm2_t6_8M_UR50D":  # PyTorch's float16 products are slow on a CPU
        hidden, mean, cosine = worst_errors(expected, checkpoint, sequences, torch.float16)
        print(f"{name} float16: hidden {hidden:.2e}, mean {mean:.2e}, worst cosine {cosine:.7f}")
        assert cosine > 0.99999

    reference = reference.double()
    expected = [fair_esm_hidden(reference, sequence) for sequence in sequences]
    hidden, mean, _ = worst_errors(expected, checkpoint, sequences, torch.float64)
    print(f"{name} float64: hidden {hidden:.2e}, mean {mean:.2e}")
    assert hidden < 1e-6
    assert mean < 1e-6
