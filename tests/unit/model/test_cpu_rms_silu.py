"""The C kernels' RMS norm, norms without bias, and SiLU gate agree with float64 to one rounding, row by row."""

import pytest
import torch
import torch.nn.functional as F

from seqmill.model.kernels import cpu
from seqmill.model.kernels.compiled import KERNELS, why_not

DIMS = [16, 48, 960, 1024, 1152]
OUR_KERNELS = pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param(name, KERNELS[name].dtype, marks=pytest.mark.skipif(bool(reason), reason=f"{name}: {reason}"))
        for name in KERNELS
        for reason in [why_not(name)]
    ],
)
# Half a step of the dtype, or float32's own error.
STEPS = {torch.float32: 2**-22, torch.bfloat16: 2**-8}
HUGE = float("inf"), -float("inf"), float("nan")


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm_written_out(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, centered: bool
) -> torch.Tensor:
    x = x.double()
    if centered:
        x = x - x.mean(-1, keepdim=True)
    y = x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return y if bias is None else y + bias.double()


@OUR_KERNELS
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("centered", "with_bias"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("with_delta", [True, False])
def test_norms(kernel: str, dtype: torch.dtype, dim: int, centered: bool, with_bias: bool, with_delta: bool) -> None:
    guarded, weight = normal(6, dim) * 3 + 1, normal(dim, seed=3)
    bias = normal(dim, seed=4) if with_bias else None
    before = guarded.clone()
    delta = normal(4, dim, seed=2).to(dtype) if with_delta else None
    x = before[1:5] + delta if delta is not None else before[1:5]
    exact = norm_written_out(x, weight, bias, 1e-6, centered)

    def near(found: torch.Tensor, dtype: torch.dtype) -> bool:
        return bool(((found.double() - exact).abs() <= exact.abs() * STEPS[dtype] + 4e-6).all())

    def run(x: torch.Tensor, dtype: torch.dtype, post: bool) -> torch.Tensor:
        return cpu.add_norm(kernel, x, delta, weight, bias, 1e-6, dtype, post, centered)

    y = run(guarded[1:5], dtype, post=False)
    assert y.dtype == dtype
    assert near(y, dtype)
    assert torch.equal(guarded[[0, 5]], before[[0, 5]])
    assert torch.equal(guarded[1:5], x)
    assert near(run(before[1:5].clone(), torch.float32, post=False), torch.float32)
    stream = before[1:5].clone()
    assert near(run(stream, dtype, post=True), dtype)
    assert near(stream, torch.float32)


@OUR_KERNELS
def test_a_norm_without_bias_has_the_bits_of_one_with_zeros(kernel: str, dtype: torch.dtype) -> None:
    x, weight = normal(5, 960), normal(960, seed=3)
    for centered in (True, False):
        without, zeros = (
            cpu.add_norm(kernel, x.clone(), None, weight, bias, 1e-5, dtype, centered=centered)
            for bias in (None, torch.zeros(960))
        )
        assert torch.equal(without, zeros)


@OUR_KERNELS
@pytest.mark.parametrize("centered", [True, False])
def test_a_row_has_the_same_bits_next_to_any_others(kernel: str, dtype: torch.dtype, centered: bool) -> None:
    """An infinite row becomes NaN, and so does one whose squares overflow: 1 / infinity would make it 0."""
    x, delta, weight = normal(6, 480), normal(6, 480, seed=2).to(dtype), normal(480, seed=3)
    x[0, 7], x[3], x[4, 9], x[5, 2] = HUGE[2], 1e15, HUGE[0], 2e20
    alone = cpu.add_norm(kernel, x[2:3].clone(), delta[2:3], weight, None, 1e-5, dtype, centered=centered)
    together = cpu.add_norm(kernel, x.clone(), delta, weight, None, 1e-5, dtype, centered=centered)
    assert torch.equal(together[2:3], alone)
    assert together[[1, 2, 3]].isfinite().all()
    assert together[[0, 4, 5]].isnan().all()


@pytest.mark.skipif(bool(why_not("avx512") or why_not("avx2")), reason="needs kernels avx512 and avx2")
def test_float32_has_the_same_bits_on_avx2_and_avx512() -> None:
    h = torch.cat([normal(7, 1280) * 30, torch.linspace(-200, 200, 1280)[None]])
    h[0, :6] = torch.tensor([*HUGE, 3e38, -3e38, -0.0])
    found = [cpu.gate(name, h, silu=True) for name in ("avx2", "avx512")]
    assert torch.equal(*(y.nan_to_num(7e37) for y in found))
    for bias in (None, normal(1280, seed=4)):
        narrow, wide = (
            cpu.add_norm(name, h[1:].clone(), h[1:], normal(1280, seed=3), bias, 1e-6, torch.float32, centered=False)
            for name in ("avx2", "avx512")
        )
        assert torch.equal(narrow, wide)


@OUR_KERNELS
@pytest.mark.parametrize("dim", DIMS)
def test_the_silu_gate(kernel: str, dtype: torch.dtype, dim: int) -> None:
    h = (normal(4, 2 * dim) * 5).to(dtype)
    first, second = h.double().chunk(2, dim=-1)
    exact = first / (1 + (-first).exp()) * second
    found = cpu.gate(kernel, h, silu=True)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= exact.abs() * 2 * STEPS[dtype] + 1e-6).all()
    assert not torch.equal(found, cpu.gate(kernel, h))
    for value in HUGE:
        odd = h.clone()
        odd[1, 5], odd[2, dim + 7] = value, value
        assert cpu.gate(kernel, odd, silu=True).isfinite().logical_not().nonzero().tolist() == [[1, 5], [2, 7]]


@pytest.mark.parametrize("kernel", [k for k in KERNELS if KERNELS[k].dtype == torch.float32 and not why_not(k)])
def test_silu_is_accurate_at_any_size(kernel: str) -> None:
    x = torch.cat([torch.linspace(-100, 100, (1 << 16) - 16), torch.logspace(2, 38, 8), -torch.logspace(2, 38, 8)])
    found = cpu.gate(kernel, torch.stack([x.view(-1, 16), torch.ones(len(x) // 16, 16)], dim=1).flatten(1), silu=True)
    exact = F.silu(x.double())
    error = (found.flatten().double() - exact).abs()
    assert (error <= 4.5e-6 * exact.abs() + 1e-36).all()  # 7e-7 from -10 on; then the exponent is rounded, too
    assert (error <= 7.5e-7 * exact.abs())[x > -10].all()
    assert not found.isnan().any()
