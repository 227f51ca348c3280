"""In Triton's interpreter on the CPU, the kernels that round to float8 agree with their eager forms, bit for bit.

The checks (check_*) run in a separate pytest session, see `triton_checks`. The interpreter's conversion to e4m3 is
wrong: it loses the mantissa's carry, cuts subnormal values, and makes NaN finite. PyTorch's takes its place; the PTX
shows that a GPU converts in hardware, to nearest.
"""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from families import SMALL, SMALL_ESM2
from float8_cases import exact, means, normal, odd_rows
from seqmill.model import float8
from seqmill.model.elementwise import EAGER, TRITON
from seqmill.model.esm2 import LAYER_NORM_EPS
from seqmill.model.float8 import Scaled, make_linear, make_norm, round_rows
from seqmill.model.kernels import float8_triton
from seqmill.model.weights import untrained_tensors
from seqmill.spec.architectures import Architecture
from triton_checks import compiled, run_in_the_interpreter

NORM = {"x": "*fp32", "delta": "*bf16", "weight": "*fp32", "bias": "*fp32", "values": "*fp8e4nv", "scales": "*fp32"}
ROUND = {"x": "*bf16", "values": "*fp8e4nv", "scales": "*fp32"}
PLAIN, GELU, GATED = ({"gelu": gelu, "gated": gated} for gelu, gated in ((False, False), (True, False), (True, True)))


@pytest.mark.full
def test_the_float8_kernels_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run_in_the_interpreter(__file__)


@pytest.mark.parametrize("capability", [89, 90, 100])
def test_the_float8_kernels_compile_and_convert_in_hardware(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    norm = {"dim": 1280, "block": 2048, "has_delta": True, "post": False}
    for ptx in (
        compiled(float8_triton._norm, NORM, {"eps": "fp32"}, norm, capability, {"num_warps": 8}),
        compiled(float8_triton._round, ROUND, {}, {"dim": 1280, "block": 2048, **PLAIN}, capability),
        compiled(float8_triton._round, ROUND, {}, {"dim": 5120, "block": 8192, **GELU}, capability, {"num_warps": 16}),
        compiled(float8_triton._round, ROUND, {}, {"dim": 3072, "block": 4096, **GATED}, capability, {"num_warps": 8}),
    ):
        assert ("cvt.rn.satfinite.e4m3x2.f16x2" if capability == 89 else "cvt.rn.satfinite.e4m3x2.f32") in ptx
        assert "ld.global.v4.b32" in ptx
        assert ".local" not in ptx  # no register is spilled


@pytest.fixture(autouse=True)
def _conversion_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    if "TRITON_INTERPRET" not in os.environ:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def replaced(values, from_dtype, to_dtype, rounding):
        if to_dtype != tl.float8e4nv:
            return convert(values, from_dtype, to_dtype, rounding)
        return torch.from_numpy(values).to(float8.FLOAT8).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", replaced)


def assert_same(found: tuple[torch.Tensor, torch.Tensor], expected: Scaled) -> None:
    assert found[0].dtype == float8.FLOAT8
    assert torch.equal(found[1].nan_to_num(-1), expected.scales.nan_to_num(-1))
    assert torch.equal(found[0].float().nan_to_num(-1), expected.values.float().nan_to_num(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 72, 1280])
def check_rows_are_rounded(width: int, dtype: torch.dtype) -> None:
    x = odd_rows(width, dtype)
    assert_same(float8_triton.round_rows(x), round_rows(x))


@pytest.mark.parametrize("width", [16, 72])
def check_gelu_and_gate(width: int) -> None:
    """The error function of the interpreter differs in the last bit, which can change the rounding of a value."""
    x = odd_rows(2 * width, torch.bfloat16)
    first, second = x.float().chunk(2, dim=1)
    for found, y in (
        (float8_triton.round_rows(x, gelu=True), F.gelu(x.float())),
        (float8_triton.round_rows(x, gelu=True, gated=True), F.gelu(first) * second),
    ):
        rows, expected = Scaled(*found), round_rows(y)
        finite = y.isfinite().all(dim=1)
        assert torch.equal(rows.scales.isfinite()[:, 0], finite)
        assert rows.values.float()[~finite].isnan().all()
        assert torch.allclose(rows.scales[finite], expected.scales[finite], rtol=1e-5, atol=0)
        off = (rows.values.float() - expected.values.float())[finite]
        assert (off.abs() <= 2**-3 * expected.values.float()[finite].abs() + 2**-9).all()
        assert (off != 0).float().mean() < 0.01


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("has_delta", [False, True])
@pytest.mark.parametrize("width", [72, 320, 768])
def check_add_norm(width: int, has_delta: bool, post: bool) -> None:
    weights = {"n.weight": normal(width, seed=3), "n.bias": normal(width, seed=4)}
    x, delta = normal(6, width), normal(6, width, seed=2).bfloat16() if has_delta else None
    x[4, 1], x[5, 2] = torch.nan, torch.inf
    eager, triton = (
        make_norm(weights, "n.", LAYER_NORM_EPS, torch.float32, float8.FLOAT8, name) for name in (EAGER, TRITON)
    )
    changed, expected_changed = x.clone(), x.clone()
    if post:
        changed, found = triton.post(changed, delta)
        expected_changed, expected = eager.post(expected_changed, delta)
    else:
        found, expected = triton.pre(changed, delta), eager.pre(expected_changed, delta)
    assert torch.allclose(changed, expected_changed, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert found.scales[4:].isnan().all()
    assert found.values[4:].float().isnan().all()
    assert torch.allclose(exact(found)[:4], exact(expected)[:4], rtol=2**-3, atol=1e-2)
    assert torch.allclose(found.scales[:4], expected.scales[:4], rtol=1e-6, atol=0)
    assert (found.values.float() != expected.values.float())[:4].double().mean() < 0.01


def check_a_row_has_the_same_bits_in_any_company() -> None:
    x = odd_rows(72, torch.bfloat16)
    together = float8_triton.round_rows(x, gelu=True)
    alone = float8_triton.round_rows(x[5:6].contiguous(), gelu=True)
    assert torch.equal(together[0][5:6].view(torch.uint8), alone[0].view(torch.uint8))
    assert torch.equal(together[1][5:6], alone[1])


def check_a_linear_layer_uses_the_kernels() -> None:
    weights = {"p.weight": normal(32, 64), "p.bias": normal(32)}
    x = normal(7, 64).bfloat16()
    eager, triton = (make_linear(weights, "p.", float8.FLOAT8, name) for name in (EAGER, TRITON))
    assert torch.equal(eager(x), triton(x))


@pytest.mark.parametrize("architecture", [SMALL_ESM2, SMALL])
def check_the_forward_with_the_kernels(architecture: Architecture) -> None:
    weights = untrained_tensors(architecture)
    expected = means(architecture, weights, torch.float32, [11, 7, 3])
    errors = {}
    for name in (EAGER, TRITON):
        found = means(architecture, weights, float8.FLOAT8, [11, 7, 3], name)
        errors[name] = ((found - expected).norm() / expected.norm()).item()
    print(architecture, errors)
    assert errors[TRITON] < 1.25 * errors[EAGER]
    assert errors[TRITON] != errors[EAGER]  # otherwise both ran the same code
