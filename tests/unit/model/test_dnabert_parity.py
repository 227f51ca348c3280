"""DNABERT-S's forward pass agrees with a padded reference and with numbers from the published code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dnabert_reference import (
    GOLDEN,
    GOLDEN_LENGTHS,
    SMALL,
    one_pack,
    random_tokens,
    reference_hidden,
    save_folder,
    seeded_state,
)
from seqmill.embedding.pooling import mean_over_tokens
from seqmill.model import layers
from seqmill.model.dnabert_s import DnabertS
from seqmill.model.encoder import make_encoder
from seqmill.model.layers import feed_forward_tokens
from seqmill.model.weights import Weights, load_weights
from seqmill.spec.architectures import DnabertArchitecture
from seqmill.spec.models import DNABERT_MODELS, find_model
from seqmill.spec.packing import MAX_PACK_TOKENS

# Packs need not be sorted by length; sequences of 1 and 2 tokens have only special tokens.
LENGTHS = [200, 37, 128, 128, 17, 2, 1]
FEW_LENGTHS = [200, 41, 41, 2, 1]
CASES = {"small": (SMALL, LENGTHS), "dnabert_s": (DNABERT_MODELS["dnabert_s"], FEW_LENGTHS)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return load_weights(find_model(str(save_folder(seeded_state(SMALL), SMALL, tmp_path_factory.mktemp("small")))))


def hidden_states(weights: Weights, sequences: list[np.ndarray], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return each sequence's hidden states, and the pooled vectors, computed as one pack with the fastest kernels."""
    pack = one_pack(sequences)
    hidden = make_encoder(weights, dtype, int(pack.lengths.max()), torch.device("cpu"))(pack)
    return hidden.split(pack.lengths.tolist()), mean_over_tokens(hidden, pack)


def worst_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest relative L2 error of any row."""
    errors = [(f - e).norm(dim=-1) / e.norm(dim=-1) for f, e in zip(found, expected, strict=True)]
    return max(error.max().item() for error in errors)


@pytest.mark.parametrize("name", ["small", pytest.param("dnabert_s", marks=pytest.mark.full)])
def test_a_pack_agrees_with_the_padded_reference(name: str, tmp_path: Path) -> None:
    architecture, lengths = CASES[name]
    state = seeded_state(architecture)
    weights = load_weights(find_model(str(save_folder(state, architecture, tmp_path))))
    sequences = random_tokens(lengths)
    expected = reference_hidden(state, architecture, sequences, torch.float64)
    expected_means = torch.stack([hidden.mean(dim=0) for hidden in expected])
    for dtype, limit in ((torch.float64, 1e-8), (torch.float32, 5e-5)):
        hidden, means = hidden_states(weights, sequences, dtype)
        errors = worst_error(hidden, expected), worst_error([means], [expected_means])
        print(f"{name} {dtype}: per token {errors[0]:.2e}, pooled {errors[1]:.2e}")
        assert hidden[0].dtype == means.dtype == dtype
        assert max(errors) < limit


@pytest.mark.full
def test_lengths_of_1_to_5000_tokens_in_one_pack(tmp_path: Path) -> None:
    """A few narrow heads, because the reference computes every score, one sequence at a time."""
    architecture = DnabertArchitecture(num_layers=2, hidden_dim=96, num_heads=3)
    state, sequences = seeded_state(architecture), random_tokens([5000, 1, 2100, 333, 64, 64, 2])
    expected = [reference_hidden(state, architecture, [one], torch.float64)[0] for one in sequences]
    means = torch.stack([hidden.mean(dim=0) for hidden in expected])
    weights = load_weights(find_model(str(save_folder(state, architecture, tmp_path))))
    for dtype, limit in ((torch.float64, 1e-8), (torch.float32, 5e-5)):
        hidden, found = hidden_states(weights, sequences, dtype)
        errors = worst_error(hidden, expected), worst_error([found], [means])
        print(f"to 5,000 tokens {dtype}: per token {errors[0]:.2e}, pooled {errors[1]:.2e}")
        assert max(errors) < limit


# PyTorch's float16 products are slow on a CPU.
@pytest.mark.parametrize(
    ("name", "dtype", "lengths"),
    [
        ("small", torch.bfloat16, LENGTHS[1:]),
        ("small", torch.float16, [60, 9, 1]),
        pytest.param("dnabert_s", torch.bfloat16, FEW_LENGTHS[1:], marks=pytest.mark.full),
    ],
)
def test_half_precision_is_about_as_accurate_as_in_the_reference(
    name: str, dtype: torch.dtype, lengths: list[int], tmp_path: Path
) -> None:
    """Seeded weights amplify rounding from layer to layer, so no fixed limit fits all models."""
    architecture = CASES[name][0]
    state, sequences = seeded_state(architecture), random_tokens(lengths)
    weights = load_weights(find_model(str(save_folder(state, architecture, tmp_path))))
    hidden, means = hidden_states(weights, sequences, dtype)
    assert hidden[0].dtype == means.dtype == torch.float32
    expected = reference_hidden(state, architecture, sequences, torch.float64)
    with torch.autocast("cpu", dtype):
        rounded = reference_hidden(state, architecture, sequences, torch.float32)
    exact, by_autocast = (torch.stack([states.mean(dim=0).double() for states in each]) for each in (expected, rounded))
    found, limit = worst_error([means.double()], [exact]), worst_error([by_autocast], [exact])
    print(f"{name} {dtype}: pooled {found:.2e}, the reference by autocast {limit:.2e}")
    assert found < 1.25 * limit


def test_agrees_with_numbers_from_the_published_code(small: Weights) -> None:
    hidden, means = hidden_states(small, random_tokens(GOLDEN_LENGTHS), torch.float64)
    for number, (first, norm, last) in enumerate(GOLDEN):
        found = [*means[number, :3].tolist(), means[number].norm().item(), *hidden[number][-1, -3:].tolist()]
        np.testing.assert_allclose(found, [*first, norm, *last], rtol=1e-10)


@pytest.mark.full
def test_the_reference_agrees_with_numbers_from_the_published_code() -> None:
    expected = reference_hidden(seeded_state(SMALL), SMALL, random_tokens(GOLDEN_LENGTHS), torch.float64)
    for hidden, (first, norm, last) in zip(expected, GOLDEN, strict=True):
        mean = hidden.mean(dim=0)
        found = [*mean[:3].tolist(), mean.norm().item(), *hidden[-1, -3:].tolist()]
        np.testing.assert_allclose(found, [*first, norm, *last], rtol=1e-10)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 16])
def test_other_numbers_of_heads(num_heads: int, tmp_path: Path) -> None:
    architecture = DnabertArchitecture(num_layers=2, hidden_dim=48, num_heads=num_heads)
    state, sequences = seeded_state(architecture), random_tokens([200, 30, 1])
    weights = load_weights(find_model(str(save_folder(state, architecture, tmp_path))))
    found, _ = hidden_states(weights, sequences, torch.float64)
    assert worst_error(found, reference_hidden(state, architecture, sequences, torch.float64)) < 1e-8


def test_a_long_feed_forward_is_computed_in_blocks(small: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = random_tokens([150, 40, 1])
    whole, _ = hidden_states(small, sequences, torch.float64)
    monkeypatch.setattr(layers, "FFN_CPU_BYTES", 64 * 2 * SMALL.ffn_dim * torch.float64.itemsize)  # 64 tokens
    in_blocks, _ = hidden_states(small, sequences, torch.float64)
    assert worst_error(in_blocks, whole) < 1e-13


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, 2 * MAX_PACK_TOKENS),  # a pack, and a contig of up to twice as many tokens, in one call
        (torch.float16, 2 * MAX_PACK_TOKENS),
        (torch.float32, MAX_PACK_TOKENS),
    ],
)
def test_a_gpu_gets_a_whole_pack_per_feed_forward_call_with_bounded_memory(dtype: torch.dtype, expected: int) -> None:
    token_bytes = 2 * DnabertArchitecture().ffn_dim * dtype.itemsize
    found = feed_forward_tokens(10 * MAX_PACK_TOKENS, torch.device("cuda"), token_bytes)
    assert found == expected
    assert found * token_bytes < 1e9


def test_other_sequences_and_the_maximum_length_do_not_matter(small: Weights) -> None:
    sequences = random_tokens([90, 33, 33, 2])
    together, _ = hidden_states(small, sequences, torch.float64)
    for sequence, expected in zip(sequences, together, strict=True):
        pack = one_pack([sequence])
        for max_tokens in (len(sequence), 1000):
            alone = DnabertS(small.architecture, small.tensors, torch.float64, max_tokens)(pack)
            assert worst_error([alone], [expected]) < 1e-13


def test_an_overflow_in_float16_is_visible(small: Weights) -> None:
    """An infinite query would give attention weights of one or zero: finite but wrong."""
    spoiled = {name: tensor.clone() for name, tensor in small.tensors.items()}
    spoiled["layers.1.qkv.bias"][5] = 1e5
    hidden, _ = hidden_states(Weights(SMALL, spoiled, "", True), random_tokens([20, 5]), torch.float16)
    assert not any(h.isfinite().any() for h in hidden)
    hidden, _ = hidden_states(Weights(SMALL, spoiled, "", True), random_tokens([20, 5]), torch.float32)
    assert all(h.isfinite().all() for h in hidden)


def test_the_mean_is_over_all_tokens() -> None:
    lengths = [7, 3, 3, 1]
    pack = one_pack(random_tokens(lengths))
    hidden = torch.randn(sum(lengths), 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    by_hand = torch.stack([part.mean(0) for part in hidden.split(lengths)])
    assert torch.allclose(mean_over_tokens(hidden, pack), by_hand, rtol=1e-12, atol=1e-12)
