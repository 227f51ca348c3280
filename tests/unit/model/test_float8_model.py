"""Float8: rounding by rows, products, the whole forward passes against float32, and overflow. Emulated on the CPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from families import SMALL, SMALL_ESM2
from float8_cases import NOT_FINITE, exact, means, normal
from product_outliers import plant_product_outliers
from reference import one_pack
from seqmill.embedding.audit import LIMITS_FLOAT8
from seqmill.errors import SeqmillError
from seqmill.model.dnabert_s import DnabertS
from seqmill.model.elementwise import EAGER
from seqmill.model.encoder import make_encoder
from seqmill.model.esm2 import ESM2
from seqmill.model.float8 import FLOAT8, LARGEST, gate, make_linear, make_norm, product, round_rows
from seqmill.model.pack import Pack
from seqmill.model.weights import Weights, untrained_tensors
from seqmill.spec.architectures import Architecture

CPU = torch.device("cpu")
STEP = 2**-4  # half a step of e4m3's mantissa, relative


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_is_off_by_half_a_step_at_most(size: float, dtype: torch.dtype) -> None:
    x = (size * normal(20, 200)).to(dtype)
    rows = round_rows(x)
    assert rows.values.dtype == FLOAT8
    assert rows.scales.shape == (20, 1)
    assert rows.scales.dtype == torch.float32
    largest = x.double().abs().amax(dim=1, keepdim=True)
    # Below 2^-6, e4m3 has steps of 2^-9.
    allowed = torch.maximum(STEP * x.double().abs(), 2**-10 * largest / LARGEST) * (1 + 1e-6)
    assert ((exact(rows) - x.double()).abs() <= allowed).all()
    assert (rows.values.float().abs().amax(dim=1) == LARGEST).all()


@pytest.mark.parametrize("factor", [1.0, 3e-39])
def test_rows_of_zeros_and_of_very_small_values_become_small_values(factor: float) -> None:
    x = factor * torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    rows = round_rows(x)
    assert (exact(rows)[0] == 0).all()
    assert (exact(rows)[1].abs() <= 1.01 * factor).all()
    assert product(rows, round_rows(normal(16, 2)), None).isfinite().all()


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("others", [0.0, 1.0])
def test_a_row_with_a_value_that_is_not_finite_gives_nan_and_no_other_row_does(value: float, others: float) -> None:
    x = torch.full((3, 32), others)
    x[1, 5] = value
    weight = normal(16, 32)
    weight[3, 5] = 0  # 0 x NaN
    y = product(round_rows(x), round_rows(weight), torch.ones(16, dtype=torch.bfloat16))
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_a_product_is_that_of_torch_scaled_mm() -> None:
    """With the arguments that CUDA gets; torch emulates it on a CPU."""
    x, weight, bias = round_rows(normal(5, 64)), round_rows(normal(48, 64, seed=2)), normal(48, seed=3).bfloat16()
    factors, scales = (x.values, weight.values.t()), (x.scales, weight.scales.t())
    expected = torch._scaled_mm(*factors, *scales, bias, out_dtype=torch.bfloat16, use_fast_accum=False)
    found = product(x, weight, bias)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=1e-3)
    written_out = exact(x) @ exact(weight).T + bias.double()
    assert ((found.double() - written_out).abs() <= 2**-8 * written_out.abs() + 1e-5).all()


def test_a_linear_layer_rounds_its_weight_by_output_channels() -> None:
    weights = {"p.weight": normal(32, 64) * torch.logspace(-3, 3, 32)[:, None], "p.bias": normal(32)}
    x = normal(7, 64).bfloat16()
    layer = make_linear(weights, "p.", FLOAT8, EAGER)
    expected = exact(round_rows(x)) @ exact(round_rows(weights["p.weight"])).T + weights["p.bias"].bfloat16().double()
    assert ((layer(x).double() - expected).abs() <= 2**-8 * expected.abs() + 1e-5).all()
    assert torch.equal(layer(round_rows(x)), layer(x))


def test_gelu_gate_and_norm_are_rounded_once() -> None:
    """From float32, not from a bfloat16 of it."""
    weights = {"p.weight": normal(32, 64), "p.bias": normal(32)}
    x = normal(7, 64).bfloat16()
    y = make_linear(weights, "p.", FLOAT8, EAGER)(x)
    found = make_linear(weights, "p.", FLOAT8, EAGER, activation="gelu")(x)
    assert torch.equal(exact(found), exact(round_rows(F.gelu(y.float()))))
    first, second = y.float().chunk(2, dim=1)
    assert torch.equal(exact(gate(EAGER, y)), exact(round_rows(F.gelu(first) * second)))

    affine = {"n.weight": normal(64), "n.bias": normal(64, seed=2)}
    norm = make_norm(affine, "n.", 1e-5, torch.float32, FLOAT8, EAGER)
    stream, delta = normal(7, 64), normal(7, 64, seed=3).bfloat16()
    expected = F.layer_norm(stream + delta, (64,), affine["n.weight"], affine["n.bias"], 1e-5)
    post, rounded = norm.post(stream.clone(), delta)
    assert torch.equal(post, expected)
    changed = stream.clone()
    for rows in (rounded, norm.pre(changed, delta)):
        assert torch.equal(exact(rows), exact(round_rows(expected)))
    assert torch.equal(changed, stream + delta)


@pytest.mark.parametrize("factor", [1, 1000])
@pytest.mark.parametrize("architecture", [SMALL_ESM2, SMALL])
def test_the_forward_agrees_with_float32(architecture: Architecture, factor: float) -> None:
    """Both families, within what the audit accepts; outliers of 1,000 times the size of the others hardly matter."""
    weights = untrained_tensors(architecture)
    expected = means(architecture, weights, torch.float32)
    found = means(architecture, plant_product_outliers(architecture, weights, factor), FLOAT8)
    assert found.dtype == torch.float32
    errors, cosines = (found - expected).norm(dim=1) / expected.norm(dim=1), F.cosine_similarity(found, expected)
    print(f"{type(architecture).__name__} x{factor}: {errors.max():.3f}, {cosines.min():.4f}")
    least, most = LIMITS_FLOAT8["warn"]
    assert errors.max() < most
    assert cosines.min() > least
    assert errors.min() > 0.01  # it was float8


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("architecture", [SMALL_ESM2, SMALL])
def test_a_token_that_is_not_finite_shows_in_its_sequence_and_in_no_other(
    architecture: Architecture, value: float
) -> None:
    weights = untrained_tensors(architecture)
    pack = one_pack(["AAAA", "AAWA", "GGG"]) if architecture is SMALL_ESM2 else None
    if pack is None:
        pack = Pack.from_tokens(np.array([1, 9, 2, 1, 7, 2, 1, 9, 9, 2], np.uint16), np.array([3, 3, 4]))
    place = 9 if architecture is SMALL_ESM2 else 4
    weights["embed.weight"][int(pack.tokens[place])] = value
    model = (ESM2 if architecture is SMALL_ESM2 else DnabertS)(architecture, weights, FLOAT8, 6)
    hidden = model(pack).split(pack.lengths.tolist())
    assert [states.isnan().all().item() for states in hidden] == [False, True, False]
    assert hidden[0].isfinite().all()
    assert hidden[2].isfinite().all()


@pytest.mark.parametrize("site", ["qkv", "fc1", "out", "fc2"])
def test_an_overflow_of_a_product_shows_as_nan(site: str) -> None:
    """bfloat16 overflows at 3e38; a conversion to float8 that saturates would hide it."""
    weights = untrained_tensors(SMALL_ESM2)
    row = 2 * SMALL_ESM2.hidden_dim + 5 if site == "qkv" else 5  # of a value
    weights[f"layers.1.{site}.weight"][row] *= 1e30
    weights["layers.1.ffn_norm.weight"] *= 1e10
    weights["layers.1.attention_norm.weight"] *= 1e10
    weights["layers.1.ffn_norm.bias"] += 1e10
    weights["layers.1.attention_norm.bias"] += 1e10
    pack = one_pack(["AAAA", "GGG"])
    hidden = ESM2(SMALL_ESM2, weights, FLOAT8, 6)(pack)
    assert not hidden.isfinite().any()


def test_widths_that_are_no_multiples_of_16_are_refused() -> None:
    architecture = replace(SMALL_ESM2, hidden_dim=72, num_heads=3)
    weights = Weights(architecture, untrained_tensors(architecture), "digest", trained=False)
    message = (
        "precision float8 needs widths that are multiples of 16, and the model's are 72 and 288; use precision bfloat16"
    )
    with pytest.raises(SeqmillError) as caught:
        make_encoder(weights, FLOAT8, 16, CPU)
    assert str(caught.value) == message


@pytest.mark.parametrize("architecture", [SMALL_ESM2, SMALL])
def test_the_cpu_computes_it_for_a_sequence_that_does_not_fit_the_gpu(architecture: Architecture) -> None:
    weights = Weights(architecture, untrained_tensors(architecture), "digest", trained=False)
    model = make_encoder(weights, FLOAT8, 140, CPU)
    assert model.elementwise == EAGER
    pack = one_pack(["MKV"])
    if architecture is SMALL:
        pack = Pack.from_tokens(np.array([1, 9, 9, 7, 2], np.uint16), np.array([5]))
    assert model(pack).isfinite().all()
