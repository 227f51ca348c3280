"""Pooling and the overflow check of the rotation on CUDA, compared with float64. Skipped without a CUDA device."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from seqmill.embedding import pooling
from seqmill.model.attention import FASTEST_FIRST, attend, why_not
from seqmill.model.esm2 import rope_tables
from seqmill.model.kernels import compiled, fused, pool_triton
from seqmill.model.pack import Pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

LENGTHS = [20_000, 4097, 2051, 2050, 131, 130, 66, 65, 64, 17, 5, *[3] * 40]
POOLINGS = [
    pooling.mean_over_residues,
    pooling.mean_over_tokens,
    pooling.max_over_residues,
    pooling.mean_and_variance,
]
Pool = Callable[[torch.Tensor, Pack], torch.Tensor]


def cuda_pack(lengths: list[int]) -> Pack:
    pack = Pack.from_tokens(np.zeros(sum(lengths), np.uint8), np.array(lengths, np.int64))
    return Pack(pack.tokens.cuda(), pack.cu_seqlens.cuda(), pack.lengths)


def hidden_states(num_tokens: int, dim: int) -> torch.Tensor:
    return torch.randn(num_tokens, dim, generator=torch.Generator().manual_seed(1)).cuda() + 1


@pytest.fixture(params=[True, False], ids=["triton", "segment_reduce"])
def with_triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Pooling with our kernels, and as without them."""
    if request.param:
        assert fused.available(torch.device("cuda"))
    else:
        monkeypatch.setattr(fused, "available", lambda device: False)
    return request.param


@pytest.mark.parametrize("dim", [320, 480, 640, 768, 1280, 2560, 5120])
@pytest.mark.parametrize("pool", POOLINGS)
def test_pooling_agrees_with_float64_on_the_cpu(pool: Pool, dim: int, with_triton: bool) -> None:
    """Values are near 1. Sums of 20,000 of them in series, as in segment_reduce, lose two digits more."""
    pack, hidden = cuda_pack(LENGTHS), hidden_states(sum(LENGTHS), dim)
    on_cpu = Pack(pack.tokens.cpu(), pack.cu_seqlens.cpu(), pack.lengths)
    exact = pool(hidden.double().cpu(), on_cpu)
    found = pool(hidden, pack)
    assert found.dtype == torch.float32
    assert (found.double().cpu() - exact).abs().max() < (2e-6 if with_triton else 1e-4)


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize("pool", POOLINGS)
def test_a_segment_has_the_same_bits_in_any_company(pool: Pool) -> None:
    hidden = hidden_states(sum(LENGTHS), 640)
    together = pool(hidden, cuda_pack(LENGTHS))
    for segment, row in zip(hidden.split(LENGTHS), together, strict=True):
        assert torch.equal(pool(segment.clone(), cuda_pack([len(segment)]))[0], row)


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pool", POOLINGS)
def test_what_is_not_finite_stays_in_its_channel_and_segment(pool: Pool, value: float) -> None:
    lengths = [700, 300, 5]
    pack, hidden = cuda_pack(lengths), hidden_states(1005, 320)
    clean = pool(hidden, pack)
    hidden[800, 7] = value
    found = pool(hidden, pack)
    touched = torch.zeros_like(found, dtype=torch.bool)
    touched[1, 7::320] = True
    assert torch.equal(found[~touched], clean[~touched])
    if pool is pooling.max_over_residues and value == -float("inf"):
        assert torch.equal(found, clean)  # all other residues are larger
    else:
        assert not found[touched].isfinite().any()


def test_pooling_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pack, hidden = cuda_pack(LENGTHS), hidden_states(sum(LENGTHS), 320)
    calls = []
    one_pass = pool_triton._pool
    monkeypatch.setattr(pool_triton, "_pool", lambda *args, **named: calls.append(1) or one_pass(*args, **named))
    for pool in POOLINGS:
        pool(hidden, pack)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for pool in POOLINGS:
            pool(hidden, pack)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 2 * len(POOLINGS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("fuse", [True, False], ids=["triton", "eager"])
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("kernel", [name for name in FASTEST_FIRST if name not in compiled.KERNELS])
def test_an_overflow_in_float16_shows_in_every_vector_of_its_sequence(
    kernel: str, head_dim: int, fuse: bool, part: int, value: float
) -> None:
    """And in no other sequence, but with FlashAttention 3, which reads the next sequence's values."""
    if reason := why_not(kernel, torch.device("cuda"), torch.float16, head_dim):
        pytest.skip(f"{kernel}: {reason}")
    lengths = [300, 200, 33]
    pack = cuda_pack(lengths)
    cos, sin = (table.cuda() for table in rope_tables(300, head_dim, torch.float32))
    qkv = torch.randn(533, 3, 4, head_dim, generator=torch.Generator().manual_seed(2)).half().cuda()
    qkv[310, part, 1, 3] = value
    first, second, third = attend(kernel, qkv, cos, sin, pack, fuse).split(lengths)
    assert not second.isfinite().all(1).any()
    assert third.isfinite().all()
    assert kernel == "flash_attn_3" or first.isfinite().all()
