"""T5's encoder agrees with transformers' on the same weights, one unpadded sequence at a time."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pack_parity import all_layers, kernels_of, make_model, one_pack, worst_errors
from seqmill.model.weights import Weights, load_weights
from seqmill.spec.models import T5_MODELS, find_model
from t5_reference import (
    SMALL,
    SMALL_PROSTT5,
    exact_norms,
    random_tokens,
    reference_hidden,
    save_folder,
    seeded_model,
    seeded_state,
)

# Residues; packs need not be sorted by length. From a distance of 128 on, all keys share a bucket.
LENGTHS = [2046, 350, 64, 64, 1, 700, 129, 128, 17, 3, 2, 1]
QUICK_LENGTHS = [400, 64, 64, 1, 129, 3, 2]
FEW_LENGTHS = [2046, 64, 64, 1, 3, 1]
CASES = {
    "quick": (SMALL, QUICK_LENGTHS),
    "quick ProstT5": (SMALL_PROSTT5, QUICK_LENGTHS),
    "small": (SMALL, LENGTHS),
    "small, 24 layers": (replace(SMALL, num_layers=24), LENGTHS),
    "prott5_xl_u50": (replace(T5_MODELS["prott5_xl_u50"], num_layers=2), FEW_LENGTHS),
    "prostt5": (replace(T5_MODELS["prostt5"], num_layers=2), FEW_LENGTHS),
}


def compare(
    name: str, folder: Path, score_spread: float = 1, exact: bool = False, lowest_cosine: float = 0.9999
) -> None:
    architecture, lengths = CASES[name]
    sequences = random_tokens(lengths, architecture)
    model = seeded_model(architecture, seeded_state(architecture, score_spread=score_spread))
    model.save_pretrained(folder)
    if exact:
        exact_norms(model)
    expected = [reference_hidden(model, tokens, torch.float64) for tokens in sequences]
    del model
    weights = load_weights(find_model(str(folder)))
    assert weights.architecture == architecture
    for dtype, limit in ((torch.float64, 1e-10 if exact else 1e-6), (torch.float32, 5e-5)):
        for kernel in kernels_of(dtype):
            errors = worst_errors(weights, sequences, expected, dtype, kernel)
            print(f"{name}, scores of {score_spread:g}, {dtype} {kernel}: {errors}")
            assert errors.hidden < limit
            assert errors.mean < limit
    for kernel in kernels_of(torch.bfloat16):
        errors = worst_errors(weights, sequences, expected, torch.bfloat16, kernel)
        print(f"{name}, scores of {score_spread:g}, bfloat16 {kernel}: {errors}")
        assert errors.cosine > lowest_cosine


@pytest.mark.parametrize(
    "name", [name if name.startswith("quick") else pytest.param(name, marks=pytest.mark.full) for name in CASES]
)
def test_every_layer_agrees_with_transformers(name: str, tmp_path: Path) -> None:
    compare(name, tmp_path)


@pytest.mark.parametrize("name", ["quick", pytest.param("prott5_xl_u50", marks=pytest.mark.full)])
def test_large_scores(name: str, tmp_path: Path) -> None:
    """T5 does not scale its scores; these have a spread of 8, so a few keys decide, and errors grow."""
    compare(name, tmp_path, score_spread=8, exact=True, lowest_cosine=0.999)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return load_weights(find_model(str(save_folder(tmp_path_factory.mktemp("small")))))


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 64), (16, 128), (8, 20)])
def test_other_buckets(buckets: int, max_distance: int, tmp_path: Path) -> None:
    architecture = replace(SMALL, num_layers=1, buckets=buckets, max_distance=max_distance)
    model, sequences = seeded_model(architecture), random_tokens([300, 20, 1])
    model.save_pretrained(tmp_path)
    expected = [reference_hidden(model, tokens, torch.float64) for tokens in sequences]
    errors = worst_errors(load_weights(find_model(str(tmp_path))), sequences, expected, torch.float64, "sdpa")
    assert max(errors.hidden, errors.mean) < 1e-6


def test_a_bias_differs_before_and_after_a_query(small: Weights) -> None:
    """The reference has it; without it, reversing all positions would change nothing but the order."""
    tokens = random_tokens([50])[0]
    model = make_model(small, torch.float64, 51, "sdpa")
    forward, backward = model(one_pack([tokens])), model(one_pack([tokens[::-1]])).flip(0)
    assert ((forward - backward).norm() / forward.norm()).item() > 0.01


def test_other_sequences_and_the_maximum_length_do_not_matter(small: Weights) -> None:
    sequences = random_tokens([190, 33, 33, 1])
    together = all_layers(make_model(small, torch.float64, 191, "sdpa"), pack := one_pack(sequences))
    for tokens, expected in zip(sequences, together.split(pack.lengths.tolist(), dim=1), strict=True):
        for max_tokens in (len(tokens), 1000):
            alone = all_layers(make_model(small, torch.float64, max_tokens, "sdpa"), one_pack([tokens]))
            assert torch.allclose(alone, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", kernels_of(torch.float32))
def test_a_longer_sequence_than_the_model_was_made_for(small: Weights, kernel: str) -> None:
    pack = one_pack(random_tokens([300]))
    model = make_model(small, torch.float32, 10, kernel)
    model.reserve(301)
    assert torch.equal(model(pack), make_model(small, torch.float32, 301, kernel)(pack))
