"""Our C kernels' layer norm of queries and keys before the rotation agrees with the same written out in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from seqmill.model.esm2 import rope_tables
from seqmill.model.kernels import cpu
from seqmill.model.kernels.compiled import KERNELS, why_not

LENGTHS = [1000, 350, 129, 65, 64, 63, 33, 32, 31, 17, 16, 15, 3, 2, 1]
SHORT = LENGTHS[1:]
EPS = 1e-5
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
OUR_KERNELS = pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param(name, KERNELS[name].dtype, marks=pytest.mark.skipif(bool(reason), reason=f"{name}: {reason}"))
        for name in KERNELS
        for reason in [why_not(name)]
    ],
)


def make_qkv(lengths: list[int], num_heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Queries and keys with means and spreads that differ by token and between heads."""
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(sum(lengths), 3, num_heads, head_dim, generator=generator)
    size = torch.randn(sum(lengths), 2, 1, 1, generator=generator).exp()
    head_size = torch.linspace(0.5, 2, num_heads)[:, None]
    qkv[:, :2] = (qkv[:, :2] * head_size + 0.7) * size
    return qkv.to(dtype)


def make_norms(width: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    generator = torch.Generator().manual_seed(4)
    query, key = torch.randn(2, width, generator=generator) * 0.3 + 0.8
    return query, key, EPS


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotate (length, heads, head_dim) by complex numbers."""
    length, _, head_dim = x.shape
    frequencies = 1.0 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies).double()
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(torch.complex(*x.chunk(2, dim=-1)) * turn).transpose(-1, -2).flatten(-2)


def written_out(sequence: torch.Tensor, norms: tuple[torch.Tensor, torch.Tensor, float]) -> torch.Tensor:
    q, k, v = sequence.double().unbind(1)
    *weights, eps = norms
    for x, weight in zip((q, k), weights, strict=True):
        flat = x.flatten(1)
        x[:] = F.layer_norm(flat, flat.shape[1:], weight.double(), eps=eps).view_as(x)
    scores = torch.einsum("qhd,khd->hqk", rotated(q), rotated(k)) * q.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def run(
    kernel: str, qkv: torch.Tensor, norms: tuple[torch.Tensor, torch.Tensor, float] | None, lengths: list[int]
) -> torch.Tensor:
    cos, sin = rope_tables(max(lengths), qkv.shape[-1], torch.float32)
    return cpu.rope_attention(kernel, qkv, cos, sin, np.array(lengths), norms)


def check_agreement(kernel: str, dtype: torch.dtype, num_heads: int, head_dim: int, lengths: list[int]) -> None:
    qkv, norms = make_qkv(lengths, num_heads, head_dim, dtype), make_norms(num_heads * head_dim)
    before = qkv.clone()
    found = run(kernel, qkv, norms, lengths)
    assert torch.equal(qkv, before)
    assert found.dtype == dtype
    for one, sequence in zip(found.split(lengths), qkv.split(lengths), strict=True):
        other = written_out(sequence, norms)
        assert ((one - other).norm() / other.norm()).item() < TOLERANCES[dtype], len(one)


@OUR_KERNELS
@pytest.mark.parametrize(("num_heads", "head_dim"), [(15, 64), (5, 16), (3, 24), (2, 32), (1, 128)])
def test_agrees_with_attention_written_out(kernel: str, dtype: torch.dtype, num_heads: int, head_dim: int) -> None:
    check_agreement(kernel, dtype, num_heads, head_dim, LENGTHS if head_dim == 16 else SHORT)


@OUR_KERNELS
def test_queries_and_keys_are_rounded_once(kernel: str, dtype: torch.dtype) -> None:
    """Next to float64, the error is at most that of PyTorch's norm and of our rotation, each of which rounds."""
    qkv, norms = make_qkv([350], 15, 64, dtype), make_norms(960)
    apart = qkv.clone()
    for part, weight in enumerate(norms[:2]):
        flat = apart[:, part].flatten(1)
        apart[:, part] = F.layer_norm(flat.float(), (960,), weight, eps=EPS).to(dtype).view(350, 15, 64)
    exact = written_out(qkv, norms)
    ours, others = (
        (found - exact).norm().item() for found in (run(kernel, qkv, norms, [350]), run(kernel, apart, None, [350]))
    )
    assert 0 < ours < (0.9 if dtype == torch.bfloat16 else 1.2) * others


@OUR_KERNELS
@pytest.mark.parametrize(("num_heads", "head_dim"), [(15, 64), (3, 24)])
def test_a_sequence_has_the_same_bits_in_any_pack(
    kernel: str, dtype: torch.dtype, num_heads: int, head_dim: int
) -> None:
    qkv, norms = make_qkv(SHORT, num_heads, head_dim, dtype), make_norms(num_heads * head_dim)
    together = run(kernel, qkv, norms, SHORT).split(SHORT)
    for sequence, expected in zip(qkv.split(SHORT), together, strict=True):
        assert torch.equal(run(kernel, sequence.contiguous(), norms, [len(sequence)]), expected)


@pytest.mark.skipif(bool(why_not("avx512") or why_not("avx2")), reason="needs kernels avx512 and avx2")
@pytest.mark.parametrize(("num_heads", "head_dim"), [(15, 64), (3, 24)])
def test_float32_has_the_same_bits_on_avx2_and_avx512(num_heads: int, head_dim: int) -> None:
    qkv, norms = make_qkv(SHORT, num_heads, head_dim, torch.float32), make_norms(num_heads * head_dim)
    assert torch.equal(*(run(name, qkv, norms, SHORT) for name in ("avx2", "avx512")))


@OUR_KERNELS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_what_is_not_finite_shows_in_its_sequence_in_all_heads_and_in_no_other(
    kernel: str, dtype: torch.dtype, part: int, value: float
) -> None:
    """3e38 is finite, but its square is not."""
    lengths = [40, 33, 9]
    qkv = make_qkv(lengths, 2, 16, dtype)
    qkv[45, part, 1, 3] = value
    first, second, third = run(kernel, qkv, make_norms(32), lengths).split(lengths)
    assert first.isfinite().all()
    assert third.isfinite().all()
    if part < 2:
        assert second[5].isnan().all()
        assert second.isnan().all(dim=1).all() == (part == 1)  # the query's own row; all rows for a key
    elif value != 3e38:
        assert not second[:, 16:].isfinite().all(dim=1).any()
