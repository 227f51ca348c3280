"""In Triton's interpreter on the CPU, the pooling kernels agree with float64; Triton compiles them for GPUs.

The checks (check_*) run in a separate pytest session, see `triton_checks`.
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from seqmill.embedding import pooling
from seqmill.model.kernels import fused, pool_triton
from seqmill.model.pack import Pack, boundaries
from triton_checks import compiled, run_in_the_interpreter

# Blocks have 64 tokens, and the second stage reads 32 blocks (2,048 tokens) at once.
LENGTHS = [5000, 2051, 131, 130, 67, 66, 65, 64, 63, 17, 5, 3, 3]
NAN, INF = float("nan"), float("inf")
Kernel = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
KERNELS: dict[Kernel, Callable[[torch.Tensor], torch.Tensor]] = {
    pool_triton.mean: lambda tokens: tokens.mean(0),
    pool_triton.largest: lambda tokens: tokens.amax(0),
    pool_triton.mean_and_variance: lambda tokens: torch.cat((tokens.mean(0), tokens.var(0, correction=0))),
}
POOLINGS = (pooling.mean_over_residues, pooling.mean_over_tokens, pooling.max_over_residues, pooling.mean_and_variance)
EPSILON = 2**-24  # half a step of float32


def test_the_kernels_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run_in_the_interpreter(__file__)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("maximum", "variance"), [(False, False), (True, False), (False, True)])
def test_they_compile_for_gpus_and_read_16_bytes_at_once(
    capability: int, maximum: bool, variance: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {
        "dim": 480,
        "before": 1,
        "after": 1,
        "maximum": maximum,
        "variance": variance,
        "tokens": pool_triton.TOKENS,
    }
    options = {"num_warps": pool_triton.WARPS}
    pointers = {"hidden": "*fp32", "cu_seqlens": "*i32", "partial": "*fp32"}
    first = constants | {"columns": pool_triton.COLUMNS}
    ptx = compiled(pool_triton._reduce_blocks, pointers, {"num_segments": "i32"}, first, capability, options)
    assert "ld.global.v4.b32" in ptx
    pointers = {"partial": "*fp32", "cu_seqlens": "*i32", "pooled": "*fp32"}
    second = constants | {"blocks": pool_triton.BLOCKS, "columns": pool_triton.COLUMNS}
    ptx = compiled(pool_triton._combine_blocks, pointers, {}, second, capability, options)
    assert "ld.global.v4.b32" in ptx
    assert "atom" not in ptx


def cu_seqlens(lengths: list[int]) -> torch.Tensor:
    return torch.from_numpy(boundaries(np.array(lengths, np.int64)))


def normal(lengths: list[int], dim: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(sum(lengths), dim, generator=torch.Generator().manual_seed(seed))


def expected(kernel: Kernel, hidden: torch.Tensor, lengths: list[int], before: int = 1, after: int = 1) -> torch.Tensor:
    parts = [tokens[before : len(tokens) - after] for tokens in hidden.double().split(lengths)]
    return torch.stack([KERNELS[kernel](part) for part in parts])


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 1), (0, 1)])
@pytest.mark.parametrize("kernel", KERNELS)
def check_odd_lengths_agree_with_float64(kernel: Kernel, before: int, after: int) -> None:
    lengths = LENGTHS if after else [*LENGTHS[2:], 2, 1]
    hidden = normal(lengths, 48) + 1
    exact = expected(kernel, hidden, lengths, before, after)
    assert (kernel(hidden, cu_seqlens(lengths), before, after) - exact).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("kernel", "dim"), [*itertools.product(KERNELS, [320, 480, 1280]), (pool_triton.mean_and_variance, 5120)]
)
def check_every_width_agrees_with_float64(kernel: Kernel, dim: int) -> None:
    lengths = [70, 3]
    hidden = normal([1, *lengths, 1], dim) + 1  # the first and the last row are no one's
    found = kernel(hidden[1:-1], cu_seqlens(lengths), 1, 1)
    assert (found - expected(kernel, hidden[1:-1], lengths)).abs().max() < 1e-6


@pytest.mark.parametrize("length", [3, 4, 10, *range(62, 69), *range(126, 133)])
def check_every_length_about_a_block_or_two(length: int) -> None:
    lengths = [length, 3, length + 1]
    hidden = normal(lengths, 3)
    for kernel in KERNELS:
        exact = expected(kernel, hidden, lengths)
        assert (kernel(hidden, cu_seqlens(lengths), 1, 1) - exact).abs().max() < 1e-6


def check_a_long_contig_keeps_its_digits() -> None:
    """All values are near 1,000, so each addition rounds. The interpreter adds up a block in series, unlike a GPU."""
    lengths = [3, 50_000, 3]
    hidden = torch.rand(sum(lengths), 8, generator=torch.Generator().manual_seed(3)) + 1000
    exact = expected(pool_triton.mean_and_variance, hidden, lengths)
    found = pool_triton.mean_and_variance(hidden, cu_seqlens(lengths), 1, 1)
    in_series = hidden[4:-4].numpy().cumsum(0, np.float32)[-1] / 49_998
    assert (found[:, :8] / exact[:, :8] - 1).abs().max() < 8 * EPSILON
    assert (in_series / exact[1, :8] - 1).abs().max() > 80 * EPSILON
    assert ((found[1, 8:] / exact[1, 8:]).sqrt() - 1).abs().max() < 1e-5  # of the standard deviation, 0.29


@pytest.mark.parametrize("kernel", KERNELS)
def check_a_segment_has_the_same_bits_in_any_company(kernel: Kernel) -> None:
    lengths = LENGTHS[1::2]
    hidden = normal(lengths, 40) * 3 + 1
    together = kernel(hidden, cu_seqlens(lengths), 1, 1)
    for segment, row in zip(hidden.split(lengths), together, strict=True):
        assert torch.equal(kernel(segment.contiguous(), cu_seqlens([len(segment)]), 1, 1)[0], row)
    backward = kernel(torch.cat(hidden.split(lengths)[::-1]), cu_seqlens(lengths[::-1]), 1, 1)
    assert torch.equal(backward.flip(0), together)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("kernel", KERNELS)
def check_what_is_not_finite_stays_in_its_channel_and_segment(kernel: Kernel, value: float) -> None:
    lengths = [130, 129, 5, 4]
    for place in (131, 257):  # the first and the last residue of the second segment
        hidden = normal(lengths, 40)
        clean = kernel(hidden, cu_seqlens(lengths), 1, 1)
        hidden[place, 7] = value
        found = kernel(hidden, cu_seqlens(lengths), 1, 1)
        torch.testing.assert_close(found[1], expected(kernel, hidden, lengths)[1].float(), equal_nan=True)
        touched = torch.zeros_like(found, dtype=torch.bool)
        touched[1, 7::40] = True
        assert torch.equal(found[~touched], clean[~touched])
    hidden = normal(lengths, 40)
    hidden[[0, 129, 130, 258]] = value  # the ends of segments, which are left out
    assert torch.equal(kernel(hidden, cu_seqlens(lengths), 1, 1), clean)


def check_the_maximum_passes_on_nan_beside_infinity() -> None:
    lengths = [200]
    hidden = normal(lengths, 4)
    hidden[[50, 150], 0] = torch.tensor([NAN, INF])
    hidden[[50, 51], 1] = torch.tensor([-INF, NAN])
    hidden[:, 2] = -INF
    found = pool_triton.largest(hidden, cu_seqlens(lengths), 1, 1)[0]
    assert found[:2].isnan().all()
    assert found[2] == -INF
    assert found[3].isfinite()


class OnCuda(torch.Tensor):
    """A tensor on the CPU that says that it is on CUDA."""

    is_cuda = True


@pytest.mark.parametrize("with_triton", [True, False])
@pytest.mark.parametrize("pool", POOLINGS)
def check_pooling_on_cuda_agrees_with_the_cpu(
    pool: Callable[[torch.Tensor, Pack], torch.Tensor], with_triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "available", lambda device: with_triton)
    calls = []
    one_pass = pool_triton._pool
    monkeypatch.setattr(pool_triton, "_pool", lambda *args, **named: calls.append(1) or one_pass(*args, **named))
    lengths = [140, 140, 66, 5, 3, 3]
    pack = Pack.from_tokens(np.zeros(sum(lengths), np.uint8), np.array(lengths, np.int64))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        hidden = normal(lengths, 40).to(dtype)
        found = pool(hidden.as_subclass(OnCuda), pack)
        assert found.dtype == dtype
        assert (found - pool(hidden, pack)).abs().max() < tolerance
    assert len(calls) == with_triton  # never for float64
