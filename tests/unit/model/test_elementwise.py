"""The elementwise steps of our C kernels agree with float64 to one rounding, row by row."""

import pytest
import torch
import torch.nn.functional as F

from seqmill.model.elementwise import EAGER, choose_elementwise, gate, post_norm, pre_norm
from seqmill.model.kernels import compiled
from seqmill.model.layers import FFN_CPU_BYTES, Activation, Linear, feed_forward_tokens

CPU = torch.device("cpu")
DIMS = [16, 48, 320, 480, 640, 768, 1280, 5120]
KERNELS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=f"{name}: {reason}"))
    for name in compiled.KERNELS
    for reason in [compiled.why_not(name)]
]
# Half a step of the dtype, or float32's own error.
WIDE = [(960, 5120, None), (1152, 6144, None), (1024, 12_288, None), (1024, 16_384, "relu"), (16_384, 1024, None)]
STEPS = {torch.float32: 2**-22, torch.bfloat16: 2**-8}


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the largest rounding error of each value in `dtype`."""
    return values.abs().double() * STEPS[dtype] + 4e-6


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("with_delta", [True, False])
def test_norms(kernel: str, dim: int, with_delta: bool) -> None:
    dtype = compiled.KERNELS[kernel].dtype
    guarded, weight, bias = normal(6, dim) * 3 + 1, normal(dim, seed=3), normal(dim, seed=4)
    before = guarded.clone()
    delta = normal(4, dim, seed=2).to(dtype) if with_delta else None
    x = before[1:5] + delta if with_delta else before[1:5]
    exact = F.layer_norm(x.double(), (dim,), weight.double(), bias.double(), 1e-5)

    y = pre_norm(kernel, guarded[1:5], delta, weight, bias, 1e-5, dtype)
    assert torch.equal(guarded[1:5], x)
    assert torch.equal(guarded[[0, 5]], before[[0, 5]])
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= step(exact, dtype)).all()

    y = pre_norm(kernel, before[1:5].clone(), delta, weight, bias, 1e-5, torch.float32)
    assert ((y.double() - exact).abs() <= step(exact, torch.float32)).all()

    stream, y = post_norm(kernel, before[1:5].clone(), delta, weight, bias, 1e-5, dtype)
    assert y.dtype == dtype
    assert ((stream.double() - exact).abs() <= step(exact, torch.float32)).all()
    assert ((y.double() - exact).abs() <= step(exact, dtype)).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_variance_is_exact_next_to_a_large_mean(kernel: str) -> None:
    """With mean 1000 and spread 1, mean square minus squared mean would keep only two digits of the variance."""
    x, one, zero = normal(4, 1280) + 1000, torch.ones(1280), torch.zeros(1280)
    exact = F.layer_norm(x.double(), (1280,), eps=1e-5)
    y = pre_norm(kernel, x, None, one, zero, 1e-5, torch.float32)
    assert (y - exact).abs().max() < 3e-4  # the mean itself is rounded to 6e-5


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dim", DIMS)
def test_the_gate(kernel: str, dim: int) -> None:
    dtype = compiled.KERNELS[kernel].dtype
    h = (normal(4, 2 * dim) * 3).to(dtype)
    first, second = h.double().chunk(2, dim=-1)
    exact = F.gelu(first) * second
    found = gate(kernel, h)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= step(exact, dtype)).all()
    h[1, 5], h[2, dim + 7] = float("nan"), float("inf")
    assert gate(kernel, h).isfinite().logical_not().nonzero().tolist() == [[1, 5], [2, 7]]


def gelu_error(found: torch.Tensor, x: torch.Tensor) -> float:
    return (found.double() - F.gelu(x.double())).abs().max().item()


@pytest.mark.parametrize("kernel", [k for k in KERNELS if compiled.KERNELS[k.values[0]].dtype == torch.float32])
def test_gelu_is_as_accurate_as_pytorchs(kernel: str) -> None:
    x = torch.linspace(-8, 8, 1 << 16)
    found = gate(kernel, torch.stack([x.view(-1, 16), torch.ones(len(x) // 16, 16)], dim=1).flatten(1)).flatten()
    assert gelu_error(found, x) < 7e-7
    assert gelu_error(F.gelu(x), x) < 2e-6


def test_the_product_with_gelu_is_as_accurate_as_pytorchs() -> None:
    x, one = torch.linspace(-8, 8, 1 << 16)[:, None], {"weight": torch.ones(1, 1)}
    assert gelu_error(Linear(one, "", torch.float32, activation="gelu")(x), x) < 7e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", None])
@pytest.mark.parametrize(
    ("dim", "result"), [(320, 1280), (1280, 320), (480, 1440), (2560, 640), (1280, 1280), (5120, 1280)]
)
def test_a_product_has_the_same_bits_for_any_number_of_tokens(
    dim: int, result: int, activation: Activation, dtype: torch.dtype
) -> None:
    """From 2 tokens on; a segment has at least 2 tokens. `F.linear` fails for 2 and 3 tokens in float32."""
    bias = {"bias": normal(result, seed=3)}
    check_a_product_has_the_same_bits(dim, result, bias, activation, dtype, 2048)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dim", "result", "activation"),
    [
        *[(960, 960, None), (2560, 960, None)],  # ESM C 300M
        *[(1152, 1152, None), (3072, 1152, None), (6912, 640, None)],  # 600M, and the widest of 6B
        *[(1024, 1024, "relu"), (4096, 1024, None), (16_384, 256, None)],  # ProtT5
        *[pytest.param(*shape, marks=pytest.mark.full) for shape in WIDE],
    ],
)
def test_a_product_without_bias_has_the_same_bits_for_any_number_of_tokens(
    dim: int, result: int, activation: Activation, dtype: torch.dtype
) -> None:
    check_a_product_has_the_same_bits(dim, result, {}, activation, dtype, 260)


def check_a_product_has_the_same_bits(
    dim: int, result: int, bias: dict[str, torch.Tensor], activation: Activation, dtype: torch.dtype, most: int
) -> None:
    x = normal(most, dim).to(dtype)
    linear = Linear({"weight": normal(result, dim, seed=2), **bias}, "", dtype, activation)
    whole = linear(x)
    linear.pack()
    assert torch.equal(linear(x), whole)
    for count in (2, 3, 4, 5, 17, 33, 65, 257, 500, 1025):
        if count < most:
            assert torch.equal(linear(x[-count:].contiguous()), whole[-count:]), count


def test_feed_forward_calls_are_about_equal() -> None:
    """One token alone would have other bits."""
    for num_tokens in (1, 2, 511, 512, 513, 1025, 8193):
        most = feed_forward_tokens(num_tokens, CPU, FFN_CPU_BYTES // 512)
        sizes = [len(call) for call in torch.empty(num_tokens, 1).split(most)]
        assert max(sizes) <= 512
        assert len(sizes) == 1 or min(sizes) > 200


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_has_the_same_bits_next_to_any_others(kernel: str) -> None:
    dtype = compiled.KERNELS[kernel].dtype
    x, delta, weight, bias = normal(5, 480), normal(5, 480, seed=2).to(dtype), normal(480, seed=3), normal(480, seed=4)
    x[0], x[3] = float("nan"), 1e15
    for norm in (pre_norm, lambda *arguments: post_norm(*arguments)[1]):
        alone = norm(kernel, x[2:3].clone(), delta[2:3], weight, bias, 1e-5, dtype)
        together = norm(kernel, x.clone(), delta, weight, bias, 1e-5, dtype)
        assert torch.equal(together[2:3], alone)
        assert together[0].isnan().all()
        assert together[[1, 2, 4]].isfinite().all()


@pytest.mark.skipif(
    bool(compiled.why_not("avx512") or compiled.why_not("avx2")), reason="needs kernels avx512 and avx2"
)
def test_float32_has_the_same_bits_on_avx2_and_avx512() -> None:
    h, weight, bias = normal(7, 2 * 640) * 3, normal(1280, seed=3), normal(1280, seed=4)
    assert torch.equal(gate("avx2", h), gate("avx512", h))
    narrow, wide = (pre_norm(name, h.clone(), h, weight, bias, 1e-5, torch.float32) for name in ("avx2", "avx512"))
    assert torch.equal(narrow, wide)


def test_the_choice() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert choose_elementwise(CPU, dtype, (320, 1280)) == (compiled.of_dtype(dtype) or EAGER)
        assert choose_elementwise(CPU, dtype, (72, 288)) == EAGER  # not a multiple of 16
    assert choose_elementwise(CPU, torch.float16, (320, 1280)) == EAGER
    assert choose_elementwise(CPU, torch.float64, (320, 1280)) == EAGER
