"""In Triton's interpreter on the CPU, the Triton kernels agree with their eager forms and with float64.

The checks (check_*) run in a separate pytest session, see `triton_checks`.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline import SCRIPTS
from seqmill.model import dnabert_s
from seqmill.model.attention import normalize, rotate
from seqmill.model.dnabert_s import DnabertS
from seqmill.model.elementwise import EAGER, TRITON, choose_elementwise
from seqmill.model.esm2 import ESM2, LAYER_NORM_EPS, rope_tables
from seqmill.model.esmc import ESMC
from seqmill.model.kernels import fused
from seqmill.model.pack import Pack
from seqmill.model.t5 import RMS_NORM_EPS, T5Encoder
from seqmill.model.weights import untrained_tensors
from seqmill.spec.architectures import DnabertArchitecture, Esm2Architecture, EsmcArchitecture, T5Architecture
from triton_checks import compiled, run_in_the_interpreter

# The interpreter truncates float32 to bfloat16 and a GPU rounds, so errors reach one step, not half a step.
STEPS = {torch.float32: 2**-22, torch.float16: 2**-11, torch.bfloat16: 2**-7}
SMALL = Esm2Architecture(num_layers=2, hidden_dim=72, num_heads=3)  # head dimension 24; 24 and 72 are not powers of two
SMALL_DNABERT = DnabertArchitecture(num_layers=2, hidden_dim=72, num_heads=3)
SMALL_ESMC = EsmcArchitecture(num_layers=2, hidden_dim=72, num_heads=3)
SMALL_T5 = T5Architecture(num_layers=2, hidden_dim=72, num_heads=3, key_dim=48, feed_forward_dim=120)
MODELS = {
    "esm2": (ESM2, SMALL),
    "dnabert_s": (DnabertS, SMALL_DNABERT),
    "esmc": (ESMC, SMALL_ESMC),
    "t5": (T5Encoder, SMALL_T5),
}


@pytest.mark.full
def test_the_kernels_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run_in_the_interpreter(__file__)


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus_and_round_to_nearest_and_move_16_bytes_at_once(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton and its assembler need no GPU; the PTX shows what the interpreter can't."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    gate_constants = {"dim": 3072, "block": 1024}
    norm = {"x": "*fp32", "delta": "*bf16", "weight": "*fp32", "bias": "*fp32", "y": "*bf16"}
    norm_constants = {"dim": 320, "block": 512, "has_delta": True, "has_bias": True, "centered": True}
    rms_constants = {**norm_constants, "has_bias": False, "centered": False}
    post_constants = {**norm_constants, "dim": 768, "block": 1024}
    rotation = {"qkv": "*bf16", "cos": "*fp32", "sin": "*fp32", "positions": "*i64"}
    rotation |= {"q_weight": "*fp32", "k_weight": "*fp32"}
    rotation_constants = {"num_heads": 20, "half": 32, "rows": 64, "columns": 32, "has_norms": True}
    for ptx in (
        compiled(fused._norm, norm, {"eps": "fp32"}, {**norm_constants, "post": False}, capability),
        compiled(fused._rotate, rotation, {"eps": "fp32"}, rotation_constants, capability),
        compiled(fused._norm, norm, {"eps": "fp32"}, {**rms_constants, "post": False}, capability),
        compiled(fused._norm, norm, {"eps": "fp32"}, {**post_constants, "post": True}, capability),
        *(
            compiled(fused._gate, {"h": "*bf16", "gated": "*bf16"}, {}, {**gate_constants, "silu": silu}, capability)
            for silu in (False, True)
        ),
    ):
        assert "cvt.rn.bf16x2.f32" in ptx
        assert "ld.global.v4.b32" in ptx
        assert "st.global.v4.b32" in ptx


def test_kernels_are_not_available_on_a_cpu() -> None:
    assert not fused.available(torch.device("cpu"))


def test_the_eager_forms_are_used_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import logging, torch; logging.basicConfig()\n"
        "from seqmill.model.kernels import fused\n"
        "print(fused.available(torch.device('cuda')))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert "triton is not installed" in done.stderr


def test_float64_is_computed_without_the_kernels() -> None:
    for device in ("cpu", "cuda"):
        assert choose_elementwise(torch.device(device), torch.float64, (320, 1280)) == EAGER


def make_pack(lengths: list[int]) -> Pack:
    tokens = np.random.default_rng(2).integers(4, 24, sum(lengths)).astype(np.uint8)
    return Pack.from_tokens(tokens, np.array(lengths, np.int64))


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the largest possible rounding error of each value in `dtype`."""
    return values.abs().double() * STEPS[dtype] + 4e-6


@pytest.mark.parametrize("dtype", list(STEPS))
@pytest.mark.parametrize("dim", [48, 320, 480, 640, 1280, 5120])
def check_add_norm(dim: int, dtype: torch.dtype) -> None:
    guarded = normal(6, dim) * 3 + 1
    before = guarded.clone()
    delta, weight, bias = normal(4, dim, seed=2).to(dtype), normal(dim, seed=3), normal(dim, seed=4)
    y = fused.add_norm(guarded[1:5], delta, weight, bias, LAYER_NORM_EPS, dtype)
    x = before[1:5] + delta  # the eager form
    assert torch.equal(guarded[1:5], x)
    assert torch.equal(guarded[[0, 5]], before[[0, 5]])
    exact = F.layer_norm(x.double(), (dim,), weight.double(), bias.double(), LAYER_NORM_EPS)
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= step(exact, dtype)).all()
    if dtype == torch.float32:
        eager = F.layer_norm(x, (dim,), weight, bias, LAYER_NORM_EPS)
        assert ((y - eager).double().abs() <= step(exact, dtype)).all()


@pytest.mark.parametrize("dtype", list(STEPS))
@pytest.mark.parametrize("dim", [48, 768, 1280])
def check_post_norm(dim: int, dtype: torch.dtype) -> None:
    guarded = normal(6, dim) * 3 + 1
    before = guarded.clone()
    delta, weight, bias = normal(4, dim, seed=2).to(dtype), normal(dim, seed=3), normal(dim, seed=4)
    for added in (delta, None):
        guarded[1:5] = before[1:5]
        y = fused.add_norm(guarded[1:5], added, weight, bias, dnabert_s.LAYER_NORM_EPS, dtype, post=True)
        x = before[1:5] if added is None else before[1:5] + added
        exact = F.layer_norm(x.double(), (dim,), weight.double(), bias.double(), dnabert_s.LAYER_NORM_EPS)
        assert y.dtype == dtype
        assert ((guarded[1:5] - exact).abs() <= step(exact, torch.float32)).all()  # the new residual stream
        assert ((y.double() - exact).abs() <= step(exact, dtype)).all()
        assert torch.equal(guarded[[0, 5]], before[[0, 5]])


@pytest.mark.parametrize("dtype", list(STEPS))
@pytest.mark.parametrize("dim", [48, 3072])
def check_gate(dim: int, dtype: torch.dtype) -> None:
    h = (normal(4, 2 * dim) * 3).to(dtype)
    first, second = h.double().chunk(2, dim=-1)
    for silu, exact in ((False, F.gelu(first) * second), (True, F.silu(first) * second)):
        found = fused.gate(h, silu)
        assert found.dtype == dtype
        assert ((found.double() - exact).abs() <= step(exact, dtype)).all()
    h[1, 5], h[2, dim + 7] = float("nan"), float("inf")
    for silu in (False, True):
        assert fused.gate(h, silu).isfinite().logical_not().nonzero().tolist() == [[1, 5], [2, 7]]


def check_norm_without_an_addition() -> None:
    x, weight, bias = normal(3, 320), normal(320, seed=3), normal(320, seed=4)
    before = x.clone()
    y = fused.add_norm(x, None, weight, bias, LAYER_NORM_EPS, torch.float32)
    assert torch.equal(x, before)
    assert (y - F.layer_norm(x, (320,), weight, bias, LAYER_NORM_EPS)).abs().max() < 4e-6


def check_the_variance_beside_a_large_mean() -> None:
    """With mean 1000 and spread 1, mean square minus squared mean would keep only two digits of the variance."""
    x, one, zero = normal(4, 1280) + 1000, torch.ones(1280), torch.zeros(1280)
    exact = F.layer_norm(x.double(), (1280,), eps=LAYER_NORM_EPS)
    y = fused.add_norm(x, None, one, zero, LAYER_NORM_EPS, torch.float32)
    assert (y - exact).abs().max() < 3e-4  # the mean itself is rounded to 6e-5


def check_a_row_has_the_same_bits_in_any_company() -> None:
    x, delta, weight, bias = normal(5, 480), normal(5, 480, seed=2).half(), normal(480, seed=3), normal(480, seed=4)
    x[0], x[3] = float("nan"), 1e15
    alone = fused.add_norm(x[2:3].clone(), delta[2:3], weight, bias, LAYER_NORM_EPS, torch.float16)
    together = fused.add_norm(x, delta, weight, bias, LAYER_NORM_EPS, torch.float16)
    assert torch.equal(together[2:3], alone)
    assert together[0].isnan().all()
    assert together[[1, 2, 4]].isfinite().all()
    alone = fused.add_norm(x[2:3].clone(), delta[2:3], weight, bias, LAYER_NORM_EPS, torch.float16, post=True)
    assert torch.equal(fused.add_norm(x, delta, weight, bias, LAYER_NORM_EPS, torch.float16, post=True)[2:3], alone)


@pytest.mark.parametrize("dtype", list(STEPS))
@pytest.mark.parametrize(("num_heads", "head_dim"), [(20, 16), (20, 24), (3, 32), (20, 64), (5, 128)])
def check_rotate(num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    pack = make_pack([1, 3, 2])
    guarded = normal(8, 3, num_heads, head_dim).to(dtype)
    before = guarded.clone()
    cos, sin = rope_tables(1000, head_dim, torch.float32)
    positions = pack.positions + torch.tensor([990, 0, 0, 0, 500, 500])
    fused.rotate(guarded[1:7], cos, sin, positions)
    expected = rotate(before[1:7, :2], cos[positions], sin[positions]).to(dtype)
    assert torch.equal(guarded[1:7, 2], before[1:7, 2])
    assert torch.equal(guarded[[0, 7]], before[[0, 7]])
    if dtype == torch.bfloat16:
        assert ((guarded[1:7, :2] - expected).double().abs() <= step(expected, dtype)).all()
    else:
        assert torch.equal(guarded[1:7, :2], expected)


@pytest.mark.parametrize("dtype", list(STEPS))
@pytest.mark.parametrize(("num_heads", "head_dim"), [(15, 64), (18, 64), (3, 24)])
def check_norms_of_queries_and_keys(num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    pack, width = make_pack([1, 3, 2]), num_heads * head_dim
    guarded = (normal(8, 3, num_heads, head_dim) * 3 + 1).to(dtype)
    before = guarded.clone()
    cos, sin = rope_tables(1000, head_dim, torch.float32)
    weights = normal(width, seed=3), normal(width, seed=4)
    fused.rotate(guarded[1:7], cos, sin, pack.positions, (*weights, LAYER_NORM_EPS))
    normal_qk = normalize(before[1:7, :2], torch.float64, (*(w.double() for w in weights), LAYER_NORM_EPS))
    exact = rotate(normal_qk, cos.double()[pack.positions], sin.double()[pack.positions])
    assert ((guarded[1:7, :2] - exact).abs() <= step(exact, dtype)).all()
    assert torch.equal(guarded[1:7, 2], before[1:7, 2])
    assert torch.equal(guarded[[0, 7]], before[[0, 7]])
    alone = before[3:4].clone()
    fused.rotate(alone, cos, sin, pack.positions[2:3], (*weights, LAYER_NORM_EPS))
    assert torch.equal(alone[0], guarded[3])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def check_a_query_that_is_not_finite_spoils_its_token_and_no_other(value: float) -> None:
    qkv = normal(3, 3, 3, 24).half()
    qkv[1, 0, 2, 5] = value
    cos, sin = rope_tables(3, 24, torch.float32)
    one = torch.ones(72)
    fused.rotate(qkv, cos, sin, torch.arange(3), (one, one, LAYER_NORM_EPS))
    assert not qkv[1, 0].isfinite().any()
    assert not qkv[1, 2].isfinite().any()  # the values show it, too
    assert qkv[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", list(STEPS))
@pytest.mark.parametrize("dim", [72, 960, 1024])
def check_rms_norm_and_norm_without_bias(dim: int, dtype: torch.dtype) -> None:
    start, delta, weight = normal(4, dim) * 3 + 1, normal(4, dim, seed=2).to(dtype), normal(dim, seed=3)
    x = start.clone()
    y = fused.add_norm(x, delta, weight, None, RMS_NORM_EPS, dtype, centered=False)
    assert torch.equal(x, start + delta)
    exact = F.rms_norm(x.double(), (dim,), weight.double(), RMS_NORM_EPS)
    assert ((y.double() - exact).abs() <= step(exact, dtype)).all()
    y = fused.add_norm(x, None, weight, None, LAYER_NORM_EPS, dtype)
    exact = F.layer_norm(x.double(), (dim,), weight.double(), None, LAYER_NORM_EPS)
    assert ((y.double() - exact).abs() <= step(exact, dtype)).all()


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", list(STEPS))
def check_the_forward(family: str, dtype: torch.dtype) -> None:
    """In 16 bits, the error is about that of the eager form, or twice that where the interpreter truncates."""
    model, architecture = MODELS[family]
    pack = make_pack([11, 11, 7, 3])
    tensors = untrained_tensors(architecture)
    eager, found = (model(architecture, tensors, dtype, 16, elementwise=name)(pack) for name in (EAGER, TRITON))
    assert found.dtype == torch.float32
    if dtype == torch.float32:
        assert ((found - eager).norm() / eager.norm()).item() < 1e-6
        return
    exact = model(architecture, tensors, torch.float32, 16)(pack)
    off, eagerly_off = ((states - exact).norm().item() for states in (found, eager))
    print(f"{family} {dtype}: {off / eagerly_off:.2f} times as far")
    assert off < (2 if dtype == torch.bfloat16 else 1.25) * eagerly_off
    assert not torch.equal(found, eager)  # otherwise both ran the same code
