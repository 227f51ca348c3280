"""Outlier channels, as in trained models, and what happens where float16 overflows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from reference import (
    OUTLIERS,
    fair_esm_hidden,
    fair_esm_model,
    one_pack,
    packed_hidden_and_means,
    plant_outliers,
    save_checkpoint,
    worst_errors,
)
from seqmill.embedding.pooling import mean_over_residues
from seqmill.model.attention import choose_kernel
from seqmill.model.esm2 import ESM2
from seqmill.model.pack import Pack
from seqmill.model.weights import untrained_tensors
from seqmill.spec.models import MODELS
from sequences import random_sequences

MODEL = "esm2_t6_8M_UR50D"
CPU = torch.device("cpu")
# The least cosine: of sequences of more than 3 residues, and of shorter ones, over which no errors average out.
SIXTEEN_BITS = [
    (torch.bfloat16, "sdpa", 0.99994, 0.9999),
    (torch.bfloat16, "auto", 0.99994, 0.9999),
    (torch.float16, "sdpa", 0.999995, 0.999995),
]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory):
    """fair-esm with outlier channels, its checkpoint, and sequences."""
    reference = plant_outliers(fair_esm_model(MODELS[MODEL]))
    checkpoint = save_checkpoint(reference, tmp_path_factory.mktemp("planted") / "model.pt")
    return reference, checkpoint, random_sequences([700, 350, 128, 128, 64, 64, 64, 17, 3, 1])


def test_the_planted_channels_are_large_but_the_others_still_decide(planted) -> None:
    reference, _, sequences = planted
    hidden = []
    norm_hook = reference.emb_layer_norm_after.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    means = np.stack([fair_esm_hidden(reference, sequence)[1:-1].mean(axis=0) for sequence in sequences])
    norm_hook.remove()
    stream = torch.cat([one.flatten(0, 1) for one in hidden]).abs()
    others = [channel for channel in range(MODELS[MODEL].hidden_dim) if channel not in OUTLIERS]
    for channel, reached in OUTLIERS.items():
        assert stream[:, channel].median().item() == pytest.approx(abs(reached), rel=0.1)
    assert stream[:, others].max() < 20
    # Layer norms compensate for them: the outliers do not dominate an embedding.
    share = (means[:, list(OUTLIERS)] ** 2).sum(axis=1) / (means**2).sum(axis=1)
    assert share.max() < 0.1


def test_float32_agrees_with_fair_esm_despite_outliers(planted) -> None:
    model, checkpoint, sequences = planted
    expected = [fair_esm_hidden(model, sequence) for sequence in sequences]
    hidden, mean, _ = worst_errors(expected, checkpoint, sequences, torch.float32)
    print(f"float32: hidden {hidden:.2e}, mean {mean:.2e}")
    assert hidden < 5e-5
    assert mean < 5e-5


@pytest.mark.parametrize(("dtype", "kernel", "least", "least_short"), SIXTEEN_BITS)
def test_16_bits_tolerate_outliers(planted, dtype: torch.dtype, kernel: str, least: float, least_short: float) -> None:
    reference, checkpoint, sequences = planted
    kernel = choose_kernel(CPU, dtype, MODELS[MODEL].head_dim, kernel)
    _, means = packed_hidden_and_means(checkpoint, sequences, dtype, kernel)
    expected = [fair_esm_hidden(reference, sequence)[1:-1].mean(axis=0) for sequence in sequences]
    pairs = zip(means, expected, strict=True)
    cosines = [mean @ other / np.linalg.norm(mean) / np.linalg.norm(other) for mean, other in pairs]
    print(f"{dtype} {kernel}: worst cosine {min(cosines):.7f}, average {np.mean(cosines):.7f}")
    for sequence, cosine in zip(sequences, cosines, strict=True):
        assert cosine > (least if len(sequence) > 3 else least_short), len(sequence)


# Overflow. A channel of the residual stream marks the letter W; weights that read it overflow float16.
LETTER, CHANNEL = "W", 7
SMALL = replace(MODELS[MODEL], num_layers=2)
HOLDERS = [True, False, True, False, True, False, True, False, True]
LENGTHS = [60, 40, 40, 40, 17, 17, 5, 2, 1]


def overflow_sequences() -> tuple[list[str], list[str]]:
    """Return sequences, some with the letter, and the same sequences with another letter in its place."""
    without = [sequence.replace(LETTER, "A") for sequence in random_sequences(LENGTHS)]
    holding = []
    for sequence, holds in zip(without, HOLDERS, strict=True):
        middle = len(sequence) // 2
        holding.append(sequence[:middle] + LETTER + sequence[middle + 1 :] if holds else sequence)
    return holding, without


def overflowing(site: str, layer: int, sign: int = 1) -> dict[str, torch.Tensor]:
    """Return weights that overflow float16 at one site of one layer, where the letter is or where it is attended to.

    After a layer norm, the channel is about 15 for the letter and about 0 for all others.
    """
    tensors = {name: tensor.clone() for name, tensor in untrained_tensors(SMALL).items()}
    d, prefix = SMALL.hidden_dim, f"layers.{layer}."

    def read_channel(name: str, row: int, factor: float) -> None:
        tensors[prefix + name + ".weight"][row] = 0
        tensors[prefix + name + ".weight"][row, CHANNEL] = factor
        tensors[prefix + name + ".bias"][row] = 0

    embed = tensors["embed.weight"]
    embed -= embed.mean(dim=1, keepdim=True)
    embed[:, CHANNEL] = 0
    embed[int(one_pack([LETTER]).tokens[1]), CHANNEL] = 30
    for number in range(SMALL.num_layers):
        for name in ("out", "fc2"):  # nothing else writes to the channel
            tensors[f"layers.{number}.{name}.weight"][CHANNEL] = 0
            tensors[f"layers.{number}.{name}.bias"][CHANNEL] = 0
        for name in ("attention_norm", "ffn_norm"):
            tensors[f"layers.{number}.{name}.bias"][CHANNEL] = 0
    if site in ("attention_norm", "ffn_norm"):
        tensors[f"{prefix}{site}.weight"][CHANNEL] = sign * 8000
    elif site in ("query", "key", "value"):
        # Dimension 7 of the first head turns slowly with the position, so the sign stays the same.
        read_channel("qkv", ("query", "key", "value").index(site) * d + 7, sign * 8000)
    elif site == "out":
        read_channel("qkv", 2 * d, 3000)
        tensors[f"{prefix}qkv.weight"][: SMALL.head_dim] = 0  # the first head attends to all tokens equally
        tensors[f"{prefix}qkv.bias"][: SMALL.head_dim] = 0
        tensors[f"{prefix}out.weight"][5, 0] = sign * 150
    elif site == "fc1":
        read_channel("fc1", 11, sign * 8000)
    elif site == "fc2":
        read_channel("fc1", 11, 3000)
        tensors[f"{prefix}fc2.weight"][:, 11] = 0
        tensors[f"{prefix}fc2.weight"][5, 11] = sign * 10
    return tensors


def embed(tensors: dict[str, torch.Tensor], sequences: list[str], dtype: torch.dtype) -> torch.Tensor:
    pack: Pack = one_pack(sequences)
    return mean_over_residues(ESM2(SMALL, tensors, dtype, int(pack.lengths.max()))(pack), pack)


def assert_overflow_shows_where_the_letter_is(tensors: dict[str, torch.Tensor]) -> None:
    holding, without = overflow_sequences()
    holds = torch.tensor(HOLDERS)
    found, other = embed(tensors, holding, torch.float16), embed(tensors, without, torch.float16)
    assert embed(tensors, holding, torch.float32).isfinite().all()  # the runner's fallback
    assert other.isfinite().all()
    assert not found[holds].isfinite().any()  # in every channel of the embedding
    assert torch.equal(found[~holds], other[~holds])


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("site", ["attention_norm", "value", "out", "ffn_norm", "fc1", "fc2"])
def test_a_float16_overflow_shows_in_its_sequences_and_in_no_other(site: str, sign: int, layer: int) -> None:
    assert_overflow_shows_where_the_letter_is(overflowing(site, layer, sign))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("site", ["query", "key"])
def test_a_float16_overflow_of_queries_or_keys_shows_or_does_no_harm(site: str, sign: int) -> None:
    """The scores of the letter's token, as query or as key, are all inf or all -inf.

    A key with scores of -inf has no weight, in float32 as well.
    """
    tensors = overflowing(site, 0, sign)
    partner = SMALL.hidden_dim if site == "query" else 0
    for row in (7, 15):  # the two dimensions that rotate together
        tensors["layers.0.qkv.weight"][partner + row] = 0
        tensors["layers.0.qkv.bias"][partner + row] = 10
    sequences, _ = overflow_sequences()
    found, expected = embed(tensors, sequences, torch.float16), embed(tensors, sequences, torch.float32)
    assert expected.isfinite().all()
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    print(site, sign, errors.tolist())
    assert (errors.isnan() | (errors < 2e-3)).all()
    assert errors[~torch.tensor(HOLDERS)].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [3, 64, 1280])
def test_gelu_of_a_negative_overflow_is_nan_where_its_exact_value_is_zero(dtype: torch.dtype, width: int) -> None:
    """A false alarm, but never a silent loss: float64 GELU is 0 for any value below float16's range."""
    assert torch.nn.functional.gelu(torch.full((2, width), -torch.inf, dtype=dtype)).isnan().all()
    assert torch.nn.functional.gelu(torch.tensor([-65504.0, -1e9], dtype=torch.float64)).eq(0).all()
