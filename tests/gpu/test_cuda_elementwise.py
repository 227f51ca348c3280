"""Elementwise steps on CUDA in Triton, compared with float64. Skipped without a CUDA device."""

import pytest
import torch
import torch.nn.functional as F
from on_cuda import HALF_STEPS, LENGTHS, cuda, make_pack, needs_cuda, on

from seqmill.embedding.pooling import mean_over_residues
from seqmill.model import dnabert_s
from seqmill.model.attention import normalize, rotate
from seqmill.model.esm2 import LAYER_NORM_EPS, rope_tables
from seqmill.model.kernels import fused
from seqmill.model.t5 import RMS_NORM_EPS
from sequences import relative_error

pytestmark = needs_cuda


def test_triton_kernels_are_available() -> None:
    assert fused.available(cuda())


@pytest.mark.parametrize("dtype", list(HALF_STEPS))
@pytest.mark.parametrize("dim", [320, 480, 640, 1280, 2560, 5120])
def test_fused_norm_agrees_with_float64_and_rounds_once(dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    x, weight, bias = (torch.randn(*shape, generator=generator).cuda() for shape in ((1000, dim), (dim,), (dim,)))
    delta = torch.randn(1000, dim, generator=generator).to(dtype).cuda()
    before, added = x.clone(), x + delta
    y = fused.add_norm(x, delta, weight, bias, LAYER_NORM_EPS, dtype)
    assert torch.equal(x, added)
    exact = F.layer_norm(added.double(), (dim,), weight.double(), bias.double(), LAYER_NORM_EPS)
    assert ((y.double() - exact).abs() <= exact.abs() * HALF_STEPS[dtype] + 4e-6).all()
    row = before[500:501].clone()
    assert torch.equal(fused.add_norm(row, delta[500:501], weight, bias, LAYER_NORM_EPS, dtype), y[500:501])


@pytest.mark.parametrize("dtype", list(HALF_STEPS))
def test_fused_post_norm_and_gate_agree_with_float64_and_round_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    x, weight, bias = (torch.randn(*shape, generator=generator).cuda() for shape in ((1000, 768), (768,), (768,)))
    delta = torch.randn(1000, 768, generator=generator).to(dtype).cuda()
    added = x + delta
    row = x[500:501].clone()
    y = fused.add_norm(x, delta, weight, bias, dnabert_s.LAYER_NORM_EPS, dtype, post=True)
    exact = F.layer_norm(added.double(), (768,), weight.double(), bias.double(), dnabert_s.LAYER_NORM_EPS)
    assert ((x - exact).abs() <= exact.abs() * HALF_STEPS[torch.float32] + 4e-6).all()
    assert ((y.double() - exact).abs() <= exact.abs() * HALF_STEPS[dtype] + 4e-6).all()
    alone = fused.add_norm(row, delta[500:501], weight, bias, dnabert_s.LAYER_NORM_EPS, dtype, post=True)
    assert torch.equal(alone, y[500:501])
    h = (torch.randn(1000, 6144, generator=generator) * 3).to(dtype).cuda()
    first, second = h.double().chunk(2, dim=-1)
    exact = F.gelu(first) * second
    assert ((fused.gate(h).double() - exact).abs() <= exact.abs() * HALF_STEPS[dtype] + 4e-6).all()


@pytest.mark.parametrize("dtype", list(HALF_STEPS))
@pytest.mark.parametrize(("num_heads", "head_dim"), [(20, 16), (20, 24), (20, 32), (20, 64), (40, 64), (40, 128)])
def test_fused_rotation_agrees_with_float64_and_rounds_once(num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    pack = on(cuda(), make_pack(LENGTHS))
    qkv = torch.randn(sum(LENGTHS), 3, num_heads, head_dim, generator=torch.Generator().manual_seed(7)).to(dtype).cuda()
    before = qkv.clone()
    cos, sin = (table.cuda() for table in rope_tables(1024, head_dim, torch.float32))
    fused.rotate(qkv, cos, sin, pack.positions)
    exact = rotate(before[:, :2].double(), cos.double()[pack.positions], sin.double()[pack.positions])
    assert ((qkv[:, :2].double() - exact).abs() <= exact.abs() * HALF_STEPS[dtype] + 1e-6).all()
    assert torch.equal(qkv[:, 2], before[:, 2])


@pytest.mark.parametrize("dtype", list(HALF_STEPS))
@pytest.mark.parametrize("num_heads", [15, 18, 40])
def test_norms_of_queries_and_keys_agree_with_float64_and_round_once(num_heads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    pack = on(cuda(), make_pack(LENGTHS))
    qkv = (torch.randn(sum(LENGTHS), 3, num_heads, 64, generator=generator) * 3 + 1).to(dtype).cuda()
    before, position = qkv.clone(), pack.positions
    cos, sin = (table.cuda() for table in rope_tables(1024, 64, torch.float32))
    q_weight, k_weight = torch.randn(2, num_heads * 64, generator=generator).cuda()
    fused.rotate(qkv, cos, sin, position, (q_weight, k_weight, LAYER_NORM_EPS))
    exact = normalize(before[:, :2], torch.float64, (q_weight.double(), k_weight.double(), LAYER_NORM_EPS))
    exact = rotate(exact, cos.double()[position], sin.double()[position])
    assert ((qkv[:, :2].double() - exact).abs() <= exact.abs() * HALF_STEPS[dtype] + 4e-6).all()
    assert torch.equal(qkv[:, 2], before[:, 2])
    alone = before[500:501].clone()
    fused.rotate(alone, cos, sin, position[500:501], (q_weight, k_weight, LAYER_NORM_EPS))
    assert torch.equal(alone, qkv[500:501])


@pytest.mark.parametrize("dtype", list(HALF_STEPS))
def test_rms_norm_and_silu_gate_agree_with_float64_and_round_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    x, weight = torch.randn(1000, 1024, generator=generator).cuda(), torch.randn(1024, generator=generator).cuda()
    delta, h = (torch.randn(1000, width, generator=generator).to(dtype).cuda() for width in (1024, 5120))
    added = x + delta
    y = fused.add_norm(x, delta, weight, None, RMS_NORM_EPS, dtype, centered=False)
    assert torch.equal(x, added)
    exact = F.rms_norm(added.double(), (1024,), weight.double(), RMS_NORM_EPS)
    assert ((y.double() - exact).abs() <= exact.abs() * HALF_STEPS[dtype] + 4e-6).all()
    first, second = h.double().chunk(2, dim=-1)
    exact = F.silu(first) * second
    assert ((fused.gate(h, silu=True).double() - exact).abs() <= exact.abs() * HALF_STEPS[dtype] + 4e-6).all()


def test_rotation_and_pooling_agree_with_the_cpu() -> None:
    pack = make_pack(LENGTHS)
    hidden = torch.randn(sum(LENGTHS), 320, generator=torch.Generator().manual_seed(2))
    found = mean_over_residues(hidden.cuda(), on(cuda(), pack)).cpu().numpy()
    assert relative_error(found, mean_over_residues(hidden, pack).numpy()) < 1e-6
    qk = torch.randn(sum(LENGTHS), 2, 4, 16, generator=torch.Generator().manual_seed(3))
    cos, sin = (table[pack.positions] for table in rope_tables(1024, 16, torch.float32))
    found = rotate(qk.cuda(), cos.cuda(), sin.cuda()).cpu().numpy()
    assert relative_error(found, rotate(qk, cos, sin).numpy()) < 1e-6
