"""The forward against fair-esm 2.0.0, sequence by sequence, unpadded, on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import esm
import numpy as np
import pytest
import torch

from reference import fair_esm_hidden, fair_esm_model, save_checkpoint
from seqpack.attention import choose_kernel
from seqpack.letters import ESM2_TOKENIZER, ProteinLetters
from seqpack.models.esm2 import ESM2
from seqpack.models.registry import MODELS, find_model
from seqpack.models.weights import load_weights
from seqpack.packs import Pack
from seqpack.pooling import mean_over_residues
from sequences import random_sequences, relative_error

LENGTHS = [1022, 700, 350, 350, 350, 128, 64, 64, 17, 3, 2, 1, 1]
SHORT_LENGTHS = [1022, 90, 90, 5, 1]

# All layers where memory and time allow; two of the blocks for the large ones, which are otherwise alike.
CASES = {
    "esm2_t6_8M_UR50D": (6, LENGTHS),
    "esm2_t12_35M_UR50D": (12, LENGTHS),
    "esm2_t30_150M_UR50D": (30, SHORT_LENGTHS),
    "esm2_t33_650M_UR50D": (4, SHORT_LENGTHS),
    "esm2_t36_3B_UR50D": (2, SHORT_LENGTHS),
    "esm2_t48_15B_UR50D": (1, [1022, 5, 1]),
}


def one_pack(sequences: list[str]) -> Pack:
    cls, eos = bytes([ESM2_TOKENIZER.cls]), bytes([ESM2_TOKENIZER.eos])
    tokens = [cls + ProteinLetters().tokens(sequence.encode()) + eos for sequence in sequences]
    lengths = np.array([len(t) for t in tokens], np.int64)
    return Pack.from_tokens(np.frombuffer(b"".join(tokens), np.uint8), lengths)


def packed_hidden_and_means(checkpoint: Path, sequences: list[str], dtype: torch.dtype, attention: str):
    weights = load_weights(find_model(str(checkpoint)))
    model = ESM2(weights.architecture, weights.tensors, dtype, max(map(len, sequences)) + 2, attention)
    pack = one_pack(sequences)
    hidden = model(pack)
    per_sequence = np.split(hidden.numpy(), np.cumsum(pack.lengths)[:-1])
    return per_sequence, mean_over_residues(hidden, pack).numpy()


def worst_errors(
    reference: esm.ESM2, checkpoint: Path, sequences: list[str], dtype: torch.dtype, attention: str = "sdpa"
):
    """Return the worst relative error per token matrix and per mean, and the worst cosine of the means."""
    hidden, means = packed_hidden_and_means(checkpoint, sequences, dtype, attention)
    hidden_errors, mean_errors, cosines = [], [], []
    for sequence, found, mean in zip(sequences, hidden, means, strict=True):
        expected = fair_esm_hidden(reference, sequence)
        expected_mean = expected[1:-1].mean(axis=0)
        hidden_errors.append(relative_error(found, expected))
        mean_errors.append(relative_error(mean, expected_mean))
        cosines.append(mean @ expected_mean / np.linalg.norm(mean) / np.linalg.norm(expected_mean))
    return max(hidden_errors), max(mean_errors), min(cosines)


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_agrees_with_fair_esm(name: str, tmp_path: Path) -> None:
    num_layers, lengths = CASES[name]
    reference = fair_esm_model(replace(MODELS[name], num_layers=num_layers))
    checkpoint = save_checkpoint(reference, tmp_path / "model.pt")
    sequences = random_sequences(lengths)

    hidden, mean, _ = worst_errors(reference, checkpoint, sequences, torch.float32)
    print(f"{name} float32: hidden {hidden:.2e}, mean {mean:.2e}")
    assert hidden < 5e-5
    assert mean < 5e-5

    # PyTorch's attention, and ours where this machine has it.
    for kernel in sorted({"sdpa", choose_kernel(torch.device("cpu"), torch.bfloat16, MODELS[name].head_dim)}):
        _, _, cosine = worst_errors(reference, checkpoint, sequences, torch.bfloat16, kernel)
        print(f"{name} bfloat16 {kernel}: worst cosine {cosine:.7f}")
        assert cosine > 0.9999

    hidden, mean, _ = worst_errors(reference.double(), checkpoint, sequences, torch.float64)
    print(f"{name} float64: hidden {hidden:.2e}, mean {mean:.2e}")
    assert hidden < 1e-6
    assert mean < 1e-6
