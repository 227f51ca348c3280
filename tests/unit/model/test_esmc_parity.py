"""ESM C's forward pass agrees with transformers' and the esm package's on the same weights, one sequence at a time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from esmc_reference import (
    GOLDEN,
    GOLDEN_BLOCKS,
    GOLDEN_LENGTHS,
    SMALL,
    random_tokens,
    reference_hidden,
    save_folder,
    seeded_model,
)
from pack_parity import all_layers, kernels_of, make_model, one_pack, worst_errors
from seqmill.model.weights import Weights, load_weights
from seqmill.spec.architectures import EsmcArchitecture
from seqmill.spec.models import ESMC_MODELS, find_model

# Residues, so up to 2,048 tokens; packs need not be sorted by length.
LENGTHS = [2046, 350, 64, 64, 1, 700, 17, 3, 2, 1]
QUICK_LENGTHS = [500, 64, 64, 1, 300, 3, 2]
FEW_LENGTHS = [2046, 90, 1, 5, 1]
CASES = {
    "quick": (SMALL, QUICK_LENGTHS),
    "small": (SMALL, LENGTHS),
    "esmc_300m": (ESMC_MODELS["esmc_300m"], FEW_LENGTHS),
    "esmc_600m": (replace(ESMC_MODELS["esmc_600m"], num_layers=4), FEW_LENGTHS),
    "esmc_6b": (replace(ESMC_MODELS["esmc_6b"], num_layers=2), FEW_LENGTHS),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return load_weights(find_model(str(save_folder(tmp_path_factory.mktemp("small")))))


@pytest.mark.parametrize(
    "name", [name if name == "quick" else pytest.param(name, marks=pytest.mark.full) for name in CASES]
)
def test_every_layer_agrees_with_transformers(name: str, tmp_path: Path) -> None:
    architecture, lengths = CASES[name]
    sequences = random_tokens(lengths)
    model = seeded_model(architecture)
    model.save_pretrained(tmp_path)
    expected = [reference_hidden(model, tokens, torch.float64) for tokens in sequences]
    del model
    weights = load_weights(find_model(str(tmp_path)))
    for dtype, limit in ((torch.float64, 1e-6), (torch.float32, 5e-5)):
        for kernel in kernels_of(dtype):
            errors = worst_errors(weights, sequences, expected, dtype, kernel)
            print(f"{name} {dtype} {kernel}: {errors}")
            assert errors.hidden < limit
            assert errors.mean < limit
    for kernel in kernels_of(torch.bfloat16):
        errors = worst_errors(weights, sequences, expected, torch.bfloat16, kernel)
        print(f"{name} bfloat16 {kernel}: {errors}")
        assert errors.cosine > 0.9999


@pytest.mark.parametrize("num_layers", [1, 40])
def test_the_residual_scale_of_other_depths(num_layers: int, tmp_path: Path) -> None:
    """sqrt(num_layers / 36) is below 1 and above it."""
    architecture = EsmcArchitecture(num_layers, hidden_dim=64, num_heads=1)
    model, sequences = seeded_model(architecture), random_tokens([40, 2])
    model.save_pretrained(tmp_path)
    expected = [reference_hidden(model, tokens, torch.float64) for tokens in sequences]
    errors = worst_errors(load_weights(find_model(str(tmp_path))), sequences, expected, torch.float64, "sdpa")
    print(f"{num_layers} layers: {errors}")
    assert max(errors.hidden, errors.mean) < 1e-9


def test_agrees_with_numbers_from_the_esm_package(small: Weights) -> None:
    sequences = random_tokens(GOLDEN_LENGTHS)
    pack = one_pack(sequences)
    hidden = make_model(small, torch.float64, max(GOLDEN_LENGTHS) + 2, "sdpa")(pack)
    for states, (first, norm, last) in zip(hidden.split(pack.lengths.tolist()), GOLDEN, strict=True):
        mean = states[1:-1].mean(dim=0)
        found = [*mean[:3].tolist(), mean.norm().item(), *states[-1, -3:].tolist()]
        np.testing.assert_allclose(found, [*first, norm, *last], rtol=1e-10)


@pytest.mark.full
def test_transformers_agrees_with_numbers_from_the_esm_package() -> None:
    model = seeded_model()
    for tokens, (first, norm, last) in zip(random_tokens(GOLDEN_LENGTHS), GOLDEN, strict=True):
        states = reference_hidden(model, tokens, torch.float64)[-1]
        mean = states[1:-1].mean(dim=0)
        found = [*mean[:3].tolist(), mean.norm().item(), *states[-1, -3:].tolist()]
        np.testing.assert_allclose(found, [*first, norm, *last], rtol=1e-10)


def test_layers_are_numbered_as_in_transformers_and_esm_has_the_last_block_before_the_norm(small: Weights) -> None:
    """Layer k is the esm package's `hidden_states[k - 1]`, except for the last, which is its `embeddings`."""
    model = make_model(small, torch.float64, 66, "sdpa")
    found = all_layers(model, one_pack([random_tokens(GOLDEN_LENGTHS)[1]]))[:, 1:-1].mean(dim=1).norm(dim=1).tolist()
    blocks, embeddings = GOLDEN_BLOCKS
    np.testing.assert_allclose(found[1:-1], blocks[:-1], rtol=1e-10)
    np.testing.assert_allclose(found[-1], embeddings, rtol=1e-10)
    assert abs(found[-1] - blocks[-1]) > 1


def test_other_sequences_and_the_maximum_length_do_not_matter(small: Weights) -> None:
    sequences = random_tokens([90, 33, 33, 1])
    together = all_layers(make_model(small, torch.float64, 92, "sdpa"), pack := one_pack(sequences))
    for tokens, expected in zip(sequences, together.split(pack.lengths.tolist(), dim=1), strict=True):
        for max_tokens in (len(tokens), 1000):
            alone = all_layers(make_model(small, torch.float64, max_tokens, "sdpa"), one_pack([tokens]))
            assert torch.allclose(alone, expected, rtol=1e-12, atol=1e-12)


def test_a_longer_sequence_than_the_model_was_made_for(small: Weights) -> None:
    pack = one_pack(random_tokens([300]))
    model = make_model(small, torch.float64, 10, "sdpa")
    model.reserve(302)
    assert torch.equal(model(pack), make_model(small, torch.float64, 302, "sdpa")(pack))


def test_an_overflow_in_float16_is_visible(small: Weights) -> None:
    """The norm of queries would hide an infinite one."""
    for part in ("qkv", "gated"):
        spoiled = {name: tensor.clone() for name, tensor in small.tensors.items()}
        spoiled[f"layers.1.{part}.weight"][5] *= 1e5
        broken = Weights(SMALL, spoiled, "", True)
        pack = one_pack(random_tokens([20, 5]))
        assert not make_model(broken, torch.float16, 22, "sdpa")(pack).isfinite().any(), part
        assert make_model(broken, torch.float32, 22, "sdpa")(pack).isfinite().all(), part
