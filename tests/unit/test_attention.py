"""Every attention kernel that this machine has, against softmax attention written out in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import SCRIPTS
from seqpack.attention import attend, choose_kernel
from seqpack.kernels import avx512
from seqpack.models.esm2 import rope_tables
from seqpack.packs import Pack
from seqpack.pooling import _by_segments, mean_over_residues

CPU = torch.device("cpu")
LENGTHS = [1024, 350, 350, 350, 129, 64, 63, 33, 32, 31, 17, 16, 15, 8, 7, 3, 3, 2, 1]
HEAD_DIMS = (16, 24, 32, 64, 128)
needs_avx512 = pytest.mark.skipif(avx512.load() is None, reason="no AVX512-BF16 processor or no C compiler")
CASES = [pytest.param("sdpa", torch.float32, 2e-6), pytest.param("sdpa", torch.bfloat16, 6e-3)]
CASES += [pytest.param("avx512", torch.bfloat16, 6e-3, marks=needs_avx512)]


def make_pack(lengths: list[int]) -> Pack:
    return Pack.from_tokens(np.zeros(sum(lengths), np.uint8), np.array(lengths, np.int64))


def make_qkv(pack: Pack, num_heads: int, head_dim: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(len(pack.tokens), 3, num_heads, head_dim, generator=generator) * scale).to(dtype)


def written_out(qkv: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Rotation by complex numbers, then softmax(q k^T / sqrt(d)) v, in float64, one sequence at a time."""
    outputs = []
    head_dim = qkv.shape[-1]
    for sequence in qkv.double().split(pack.lengths.tolist()):
        q, k, v = sequence.unbind(1)
        # The angles are those of fair-esm, computed in float32: they are part of the model.
        frequencies = 1.0 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.outer(torch.arange(len(q)).float(), frequencies).double()
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        half = head_dim // 2
        q, k = (torch.complex(x[..., :half], x[..., half:]) * turn for x in (q, k))
        scores = torch.einsum("qhd,khd->hqk", q, k.conj()).real * head_dim**-0.5
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))
    return torch.cat(outputs)


def run(kernel: str, qkv: torch.Tensor, pack: Pack) -> torch.Tensor:
    cos, sin = rope_tables(int(pack.lengths.max()), qkv.shape[-1], torch.float32)
    return attend(kernel, qkv, cos, sin, pack)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("kernel", "dtype", "tolerance"), CASES)
def test_agrees_with_attention_written_out(kernel: str, dtype: torch.dtype, tolerance: float, head_dim: int) -> None:
    pack = make_pack(LENGTHS)
    qkv = make_qkv(pack, 3, head_dim, dtype)
    found, expected = run(kernel, qkv, pack), written_out(qkv, pack)
    assert found.dtype == dtype
    for one, other in zip(found.split(LENGTHS), expected.split(LENGTHS), strict=True):
        error = ((one - other).norm() / other.norm()).item()
        assert error < tolerance, (len(one), error)


@pytest.mark.parametrize(("kernel", "dtype", "tolerance"), CASES)
def test_large_scores_do_not_overflow(kernel: str, dtype: torch.dtype, tolerance: float) -> None:
    """Queries and keys of 1e3, as outlier channels make them: scores of 1e6, softmax all but one-hot."""
    pack = make_pack([200, 33])
    qkv = make_qkv(pack, 2, 16, dtype)
    qkv[:, :2] *= 1000
    found = run(kernel, qkv, pack)
    assert found.isfinite().all()
    # Each output is one of the values, the one whose key scores best; rounding of scores may swap near ties.
    expected = written_out(qkv, pack)
    close = ((found - expected).abs() < 0.02).all(-1).double().mean().item()
    assert close > 0.9


@pytest.mark.parametrize("kernel", ["avx512", "sdpa"])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_nan_shows_in_its_sequence_and_in_no_other(kernel: str, part: int) -> None:
    if kernel == "avx512" and avx512.load() is None:
        pytest.skip("no AVX512-BF16 processor or no C compiler")
    pack = make_pack([40, 17, 9])
    qkv = make_qkv(pack, 2, 16, torch.bfloat16)
    qkv[45, part, 1, 3] = float("nan")
    first, second, third = run(kernel, qkv, pack).split([40, 17, 9])
    assert first.isfinite().all()
    assert third.isfinite().all()
    assert second[5].isnan().any()  # the query's own row; all rows for a key or a value
    assert second.isnan().any(dim=1).all() == (part > 0)


@needs_avx512
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_our_kernel_gives_a_sequence_the_same_bits_in_any_company(head_dim: int) -> None:
    pack = make_pack(LENGTHS)
    qkv = make_qkv(pack, 2, head_dim, torch.bfloat16)
    together = run("avx512", qkv, pack).split(LENGTHS)
    for sequence, expected in zip(qkv.split(LENGTHS), together, strict=True):
        alone = run("avx512", sequence.contiguous(), make_pack([len(sequence)]))
        assert torch.equal(alone, expected)


@needs_avx512
def test_our_kernel_is_chosen_where_it_can_be() -> None:
    assert choose_kernel(CPU, torch.bfloat16, 16) == "avx512"
    assert choose_kernel(CPU, torch.float32, 16) == "sdpa"
    assert choose_kernel(CPU, torch.bfloat16, 48) == "sdpa"


def test_without_a_compiler_pytorchs_kernel_serves(tmp_path: Path) -> None:
    code = (
        "import logging, torch; logging.basicConfig()\n"
        "from seqpack.attention import choose_kernel\n"
        "print(choose_kernel(torch.device('cpu'), torch.bfloat16, 16))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "XDG_CACHE_HOME": str(tmp_path), "PATH": "", "CC": "none"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "sdpa"
    if avx512.load() is not None:
        assert "no C compiler found" in done.stderr


@needs_avx512
def test_processes_that_compile_at_once_share_one_library(tmp_path: Path) -> None:
    code = "from seqpack.kernels import avx512; assert avx512.load() is not None"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "XDG_CACHE_HOME": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(4)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    assert len(list((tmp_path / "seqpack").iterdir())) == 1


def test_pooling_by_segments_is_pooling_by_runs() -> None:
    """The way CUDA pools, run on the CPU."""
    pack = make_pack(LENGTHS[:-1])
    hidden = torch.randn(len(pack.tokens), 48, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    by_hand = torch.stack([part[1:-1].mean(0) for part in hidden.split(pack.lengths.tolist())])
    kept = [number for number, length in enumerate(LENGTHS[:-1]) if length > 2]
    for found in (mean_over_residues(hidden, pack), _by_segments(hidden, pack)):
        assert torch.allclose(found[kept], by_hand[kept], rtol=1e-12, atol=1e-12)


def test_a_packs_pieces_are_the_pack() -> None:
    tokens = np.random.default_rng(0).integers(0, 33, sum(LENGTHS)).astype(np.uint8)
    pack = Pack.from_tokens(tokens, np.array(LENGTHS, np.int64))
    expected = np.concatenate([np.arange(length) for length in LENGTHS])
    assert (pack.positions.numpy() == expected).all()
    for limit in (1, 64, 400, 1024, 10_000):
        pieces = pack.split(limit)
        assert (torch.cat([piece.tokens for piece in pieces]).numpy() == tokens).all()
        assert np.concatenate([piece.lengths for piece in pieces]).tolist() == LENGTHS
        assert (torch.cat([piece.positions for piece in pieces]).numpy() == expected).all()
        for piece in pieces:
            assert piece.cu_seqlens.tolist() == [0, *np.cumsum(piece.lengths).tolist()]
            assert len(piece.tokens) <= limit or len(piece.lengths) == 1
            covered = [count * length for _, count, length in piece.runs]
            assert sum(covered) == len(piece.tokens)
