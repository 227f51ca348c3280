"""Kernels for attention with linear biases: agreement with attention written out in float64, and their choice.

The Triton kernel's checks (check_*) run in a separate pytest session, see `triton_checks`.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dnabert_reference import slopes_written_out
from seqmill.errors import SeqmillError
from seqmill.model import alibi, attention
from seqmill.model.alibi import FASTEST_FIRST, attend, choose_kernel, make_biases
from seqmill.model.dnabert_s import DnabertS
from seqmill.model.kernels import biased_triton, cpu
from seqmill.model.kernels.compiled import KERNELS, why_not
from seqmill.model.pack import Pack
from seqmill.model.weights import untrained_tensors
from seqmill.spec.architectures import DnabertArchitecture
from triton_checks import compiled, run_in_the_interpreter, widen_bfloat16_products

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = [1000, 500, 65, 64, 63, 33, 32, 31, 17, 3, 2, 1]
TRITON_LENGTHS = [260, 129, 128, 65, 33, 17, *[3] * 5, 2, 1, 1]  # blocks have 32, 64 or 128 tokens
TRITON_TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 6e-3}
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 3e-3}
UNUSABLE = {name: pytest.mark.skipif(bool(why_not(name)), reason=f"{name}: {why_not(name)}") for name in KERNELS}
OUR_KERNELS = pytest.mark.parametrize(
    ("kernel", "dtype"), [pytest.param(name, KERNELS[name].dtype, marks=UNUSABLE[name]) for name in KERNELS]
)
# A stand-in for the package, with its published signature and documented biases.
FLASH_ATTN_2 = """
import torch
def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                           deterministic=False, return_attn_probs=False, block_table=None):
    assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    assert alibi_slopes.dtype == torch.float32 and alibi_slopes.shape == q.shape[1:2]
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    output = torch.empty_like(v)
    for begin, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist()):
        i, j = torch.arange(end - begin)[:, None], torch.arange(end - begin)
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), k[begin:end].float()) * softmax_scale
        scores -= alibi_slopes[:, None, None] * (i + (end - begin) - (end - begin) - j).abs()
        output[begin:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[begin:end].float()).to(v.dtype)
    return output
"""


def make_pack(lengths: list[int]) -> Pack:
    return Pack.from_tokens(np.zeros(sum(lengths), np.uint16), np.array(lengths, np.int64))


def make_qkv(lengths: list[int], num_heads: int, head_dim: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(sum(lengths), 3, num_heads, head_dim, generator=generator)
    qkv[:, :2] *= scale
    return qkv.to(dtype)


def written_out(sequence: torch.Tensor) -> torch.Tensor:
    """Return the attention output of one sequence in float64, one head at a time."""
    places = torch.arange(len(sequence), dtype=torch.float64)
    distances = (places[:, None] - places).abs()
    heads = []
    for head, slope in enumerate(slopes_written_out(sequence.shape[2])):
        q, k, v = sequence[:, :, head].double().unbind(1)
        heads.append((q @ k.T * sequence.shape[-1] ** -0.5 - slope * distances).softmax(-1) @ v)
    return torch.cat(heads, dim=1)


def worst_error(found: torch.Tensor, qkv: torch.Tensor, lengths: list[int]) -> float:
    errors = []
    for one, sequence in zip(found.split(lengths), qkv.split(lengths), strict=True):
        other = written_out(sequence)
        errors.append(((one - other).norm() / other.norm()).item())
    return max(errors)


def run(kernel: str, qkv: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return attend(kernel, qkv, make_biases(kernel, qkv.shape[2], max(lengths), torch.float32), make_pack(lengths))


@OUR_KERNELS
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])  # the larger the scores, the fewer keys are skipped
def test_our_kernel_agrees_with_attention_written_out(kernel: str, dtype: torch.dtype, scale: float) -> None:
    qkv = make_qkv(LENGTHS, 12, 64, dtype, scale)
    found = run(kernel, qkv, LENGTHS)
    assert found.dtype == dtype
    assert worst_error(found, qkv, LENGTHS) < TOLERANCES[dtype]


@OUR_KERNELS
@pytest.mark.parametrize("head_dim", cpu.HEAD_DIMS)
def test_our_kernel_supports_other_head_dimensions(kernel: str, dtype: torch.dtype, head_dim: int) -> None:
    qkv = make_qkv(LENGTHS[1:], 5, head_dim, dtype)
    assert worst_error(run(kernel, qkv, LENGTHS[1:]), qkv, LENGTHS[1:]) < TOLERANCES[dtype]


@OUR_KERNELS
def test_a_distant_key_that_outweighs_its_bias_is_not_skipped(kernel: str, dtype: torch.dtype) -> None:
    """The last of 2,000 keys adds 1,568 to its score with the first query; its distance takes at most 1,413 off."""
    length = 2000
    qkv = make_qkv([length], 12, 64, dtype)
    qkv[0, 0] = qkv[-1, 1] = 14.0
    found = run(kernel, qkv, [length])
    assert torch.equal(found[0], qkv[-1, 2].flatten())
    assert worst_error(found, qkv, [length]) < TOLERANCES[dtype]


@pytest.mark.skipif(bool(why_not("avx512") or why_not("avx2")), reason="needs kernels avx512 and avx2")
@pytest.mark.parametrize("scale", [0.0, 1.0])  # 0: every key counts up to a distance that its slope alone decides
def test_float32_has_the_same_bits_on_avx2_and_avx512(scale: float) -> None:
    qkv = make_qkv([700, 65, 33, 17, 1], 12, 64, torch.float32, scale)
    assert torch.equal(*(run(name, qkv, [700, 65, 33, 17, 1]) for name in ("avx2", "avx512")))


@OUR_KERNELS
def test_our_kernel_gives_a_sequence_the_same_bits_in_any_pack(kernel: str, dtype: torch.dtype) -> None:
    qkv = make_qkv(LENGTHS, 12, 64, dtype)
    together = run(kernel, qkv, LENGTHS).split(LENGTHS)
    for sequence, expected in zip(qkv.split(LENGTHS), together, strict=True):
        assert torch.equal(run(kernel, sequence.contiguous(), [len(sequence)]), expected)


@OUR_KERNELS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_nonfinite_values_affect_their_own_sequence_at_any_distance_and_no_other(
    kernel: str, dtype: torch.dtype, part: int, value: float
) -> None:
    lengths = [1000, 900, 9]
    qkv = make_qkv(lengths, 2, 64, dtype)
    qkv[1890, part, 0, 3] = value  # in the steeper head, which would skip most of the sequence
    first, second, third = run(kernel, qkv, lengths).split(lengths)
    assert first.isfinite().all()
    assert third.isfinite().all()
    rows = second.isfinite().all(dim=1)
    if part == 1 and value == float("inf"):  # its weight is 0 for queries of the other sign, as in PyTorch
        assert not rows.all()
    else:
        assert not rows[890]
        assert rows.any() == (part == 0)  # the query's own row; all rows for a key or a value


@OUR_KERNELS
def test_the_forward_with_our_kernel_is_as_accurate_as_with_pytorchs(kernel: str, dtype: torch.dtype) -> None:
    architecture = DnabertArchitecture(num_layers=2, hidden_dim=192, num_heads=3)
    lengths = [600, 37, 128, 128, 17, 2, 1]
    tokens = np.random.default_rng(2).integers(5, 4000, sum(lengths)).astype(np.uint16)
    pack = Pack.from_tokens(tokens, np.array(lengths, np.int64))
    tensors = untrained_tensors(architecture)
    exact = DnabertS(architecture, tensors, torch.float64, 600)(pack)
    ours, pytorchs = (
        ((DnabertS(architecture, tensors, dtype, 600, attention)(pack) - exact).norm() / exact.norm()).item()
        for attention in (kernel, "sdpa")
    )
    assert 0 < ours < 1.1 * pytorchs


def test_our_kernel_is_chosen_where_possible() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        usable = [name for name, kernel in KERNELS.items() if kernel.dtype == dtype and not why_not(name)]
        assert choose_kernel(CPU, dtype, 64) == [*usable, "sdpa"][0]
    assert choose_kernel(CPU, torch.bfloat16, 64, "sdpa") == "sdpa"


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "head_dim", "reason"),
    [
        ("flash_attn_4", CPU, torch.bfloat16, 64, "'flash_attn_4' is not known; use one of auto, amx, avx512_bf16"),
        ("varlen", CUDA, torch.bfloat16, 64, "attention varlen can't be used: it has no linear biases"),
        ("flash_attn_3", CUDA, torch.bfloat16, 64, "it has no linear biases, .*; use attention auto or another"),
        ("triton", CPU, torch.bfloat16, 64, "triton can't be used: it runs on a CUDA device, and the device is cpu"),
        ("triton", CUDA, torch.float64, 64, "in float32, bfloat16 or float16, and the precision is float64"),
        ("triton", CUDA, torch.bfloat16, 192, "it takes head dimensions up to 128; the model's is 192"),
        ("avx512_bf16", CPU, torch.float32, 64, "it computes in bfloat16, and the precision is float32"),
        ("flash_attn_2", CPU, torch.bfloat16, 64, "it runs on a CUDA device, and the device is cpu"),
    ],
)
def test_a_kernel_that_cannot_be_used_says_why(
    requested: str, device: torch.device, dtype: torch.dtype, head_dim: int, reason: str
) -> None:
    with pytest.raises(SeqmillError, match=reason):
        choose_kernel(device, dtype, head_dim, requested)


def test_only_pytorchs_kernel_needs_a_table_of_biases() -> None:
    for kernel in FASTEST_FIRST:
        biases = make_biases(kernel, 12, 100, torch.float32)
        assert biases.shape == ((12, 199) if kernel == "sdpa" else (12,))


@pytest.fixture
def flash_attn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "flash_attn.py").write_text(FLASH_ATTN_2)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    attention._packed_function.cache_clear()
    yield
    attention._packed_function.cache_clear()
    sys.modules.pop("flash_attn", None)


@pytest.mark.usefixtures("flash_attn")
def test_flash_attention_is_called_with_its_published_signature() -> None:
    lengths = [140, 17, 9, 1]
    qkv = make_qkv(lengths, 12, 64, torch.float16)
    assert worst_error(run("flash_attn_2", qkv, lengths), qkv, lengths) < 8e-4


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize(("triton_runs", "expected"), [("", "triton"), ("no compiler", "flash_attn_2")])
def test_the_fastest_usable_kernel_is_chosen(triton_runs: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(biased_triton, "why_not", lambda *found, is_relative: triton_runs)
    assert choose_kernel(CUDA, torch.bfloat16, 64) == expected
    assert choose_kernel(CUDA, torch.float32, 64) == ("triton" if expected == "triton" else "sdpa")
    assert choose_kernel(CUDA, torch.float64, 64) == "sdpa"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_reason_is_given_if_tritons_kernel_does_not_run() -> None:
    assert alibi.why_not("triton", CUDA, torch.bfloat16, 64).startswith("Triton's kernel does not run (")


@pytest.mark.full
def test_the_triton_kernel_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run_in_the_interpreter(__file__)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", biased_triton.DTYPES)
def test_the_triton_kernel_compiles_to_tensor_cores_or_exact_products(
    dtype: torch.dtype, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kind = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    pointers = {"qkv": kind, "biases": "*fp32", "cu_seqlens": "*i32", "output": kind}
    queries, keys, warps, stages = biased_triton._blocks(dtype, 64)
    constants = {"num_heads": 12, "head_dim": 64, "columns": 64, "queries": queries, "keys": keys, "span": 0}
    options = {"num_warps": warps, "num_stages": stages}
    scalars = {"scale": "fp32", "num_sequences": "i32"}
    ptx = compiled(biased_triton._attention, pointers, scalars, constants, capability, options)
    assert ("mma" in ptx) == (dtype != torch.float32)
    assert ("wgmma" in ptx) == (dtype != torch.float32 and capability == 90)
    assert "tf32" not in ptx
    assert "cp.async.cg.shared.global" in ptx  # 16 bytes at once


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    widen_bfloat16_products(monkeypatch)


def run_triton(qkv: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return biased_triton.alibi_attention(qkv, alibi.slopes(qkv.shape[2]), make_pack(lengths).cu_seqlens)


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("dtype", biased_triton.DTYPES)
@pytest.mark.parametrize("head_dim", [16, 24, 64, 128])
def check_agrees_with_attention_written_out(head_dim: int, dtype: torch.dtype) -> None:
    qkv = make_qkv(TRITON_LENGTHS, 2, head_dim, dtype)
    found = run_triton(qkv, TRITON_LENGTHS)
    assert found.dtype == dtype
    assert worst_error(found, qkv, TRITON_LENGTHS) < TRITON_TOLERANCES[dtype]


def check_large_scores_do_not_overflow() -> None:
    qkv = make_qkv([200, 33], 2, 64, torch.float32, 100.0)
    assert worst_error(run_triton(qkv, [200, 33]), qkv, [200, 33]) < 1e-4


def check_a_sequence_has_the_same_bits_in_any_company() -> None:
    qkv = make_qkv(TRITON_LENGTHS, 2, 64, torch.float16)
    together = run_triton(qkv, TRITON_LENGTHS).split(TRITON_LENGTHS)
    for sequence, expected in zip(qkv.split(TRITON_LENGTHS), together, strict=True):
        assert torch.equal(run_triton(sequence.contiguous(), [len(sequence)]), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", [0, 1, 2])
def check_what_is_not_finite_shows_in_its_sequence_and_in_no_other(part: int, value: float) -> None:
    lengths = [140, 130, 9]
    qkv = make_qkv(lengths, 2, 16, torch.float16)
    qkv[265, part, 1, 3] = value
    first, second, third = run_triton(qkv, lengths).split(lengths)
    assert first.isfinite().all()
    assert third.isfinite().all()
    assert not second[125].isfinite().all()  # the query's own row; all rows for a key or a value
    assert second.isfinite().all(dim=1).any() == (part == 0)
