"""In Triton's interpreter on the CPU, attention with T5's biases agrees with attention written out in float64.

The checks (check_*) run in a separate pytest session, see `triton_checks`.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from seqmill.model import relative
from seqmill.model.kernels import biased_triton
from seqmill.model.pack import boundaries
from triton_checks import compiled, run_in_the_interpreter, widen_bfloat16_products

LENGTHS = [300, 130, 129, 64, 3, 1]
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # relative to the largest
SPAN = 20


@pytest.mark.full
def test_relative_attention_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run_in_the_interpreter(__file__)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relative_attention_compiles_to_tensor_cores_or_exact_products(
    dtype: torch.dtype, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kind = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    pointers = {"qkv": kind, "biases": "*fp32", "cu_seqlens": "*i32", "output": kind}
    queries, keys, warps, stages = biased_triton._blocks(dtype, 128)
    constants = {"num_heads": 32, "head_dim": 128, "columns": 128, "queries": queries, "keys": keys, "span": 128}
    options = {"num_warps": warps, "num_stages": stages}
    scalars = {"scale": "fp32", "num_sequences": "i32"}
    ptx = compiled(biased_triton._attention, pointers, scalars, constants, capability, options)
    assert ("mma" in ptx) == (dtype != torch.float32)
    assert ("wgmma" in ptx) == (dtype != torch.float32 and capability == 90)
    assert "tf32" not in ptx


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    widen_bfloat16_products(monkeypatch)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_qkv(lengths: list[int], num_heads: int, head_dim: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Return queries with which unscaled scores have a spread of `scale`, keys, and values."""
    qkv = normal(sum(lengths), 3, num_heads, head_dim, seed=3)
    qkv[:, 0] *= scale * head_dim**-0.5
    return qkv.to(dtype)


def make_biases(num_heads: int) -> torch.Tensor:
    return normal(num_heads, 2 * SPAN + 1, seed=4)


def run(qkv: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    cu_seqlens = torch.from_numpy(boundaries(np.array(lengths, np.int64)))
    return biased_triton.relative_attention(qkv, make_biases(qkv.shape[2]), cu_seqlens)


def worst_error(found: torch.Tensor, qkv: torch.Tensor, lengths: list[int]) -> float:
    biases, worst = make_biases(qkv.shape[2]).double(), 0.0
    for sequence, part in zip(qkv.double().split(lengths), found.double().split(lengths), strict=True):
        q, k, v = sequence.permute(1, 2, 0, 3)
        places = torch.arange(len(sequence))
        scores = q @ k.transpose(1, 2) + biases[:, (places - places[:, None]).clamp(-SPAN, SPAN) + SPAN]
        exact = (scores.softmax(dim=2) @ v).transpose(0, 1).flatten(1)
        worst = max(worst, ((part - exact).abs().max() / exact.abs().max()).item())
    return worst


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("head_dim", [24, 128])
def check_agrees_with_attention_written_out(head_dim: int, dtype: torch.dtype) -> None:
    qkv = make_qkv(LENGTHS, 2, head_dim, dtype)
    found = run(qkv, LENGTHS)
    assert found.dtype == dtype
    assert worst_error(found, qkv, LENGTHS) < TOLERANCES[dtype]


def check_large_scores_do_not_overflow() -> None:
    qkv = make_qkv([200, 33], 2, 64, torch.float32, 60.0)
    assert worst_error(run(qkv, [200, 33]), qkv, [200, 33]) < 1e-4


def check_a_sequence_has_the_same_bits_in_any_company() -> None:
    qkv = make_qkv(LENGTHS, 2, 64, torch.float16)
    together = run(qkv, LENGTHS).split(LENGTHS)
    for sequence, expected in zip(qkv.split(LENGTHS), together, strict=True):
        assert torch.equal(run(sequence.contiguous(), [len(sequence)]), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [0, 1, 2])
def check_what_is_not_finite_shows_in_its_sequence_and_in_no_other(part: int, value: float) -> None:
    lengths = [140, 130, 9]
    qkv = make_qkv(lengths, 2, 16, torch.float16)
    qkv[265, part, 1, 3] = value
    first, second, third = run(qkv, lengths).split(lengths)
    assert first.isfinite().all()
    assert third.isfinite().all()
    assert not second[125].isfinite().all()


def check_the_table_of_the_model_is_read_as_pytorch_reads_it() -> None:
    qkv, lengths = make_qkv(LENGTHS, 4, 32, torch.float32), np.array(LENGTHS, np.int64)
    weight = normal(32, 4, seed=5)
    from seqmill.model.pack import Pack

    pack = Pack.from_tokens(np.zeros(sum(LENGTHS), np.uint8), lengths)
    found = [
        relative.attend(kernel, qkv, relative.make_biases(kernel, weight, 128, 300), pack)
        for kernel in ("triton", "sdpa")
    ]
    assert ((found[0] - found[1]).abs().max() / found[1].abs().max()).item() < 2e-6
