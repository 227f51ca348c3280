"""Every attention kernel of this machine agrees with softmax attention written out in float64."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import SCRIPTS
from seqmill.base.machine import processor
from seqmill.embedding.pooling import _by_segments, mean_over_residues
from seqmill.errors import SeqmillError
from seqmill.model import alibi, attention
from seqmill.model.attention import FASTEST_FIRST, attend, choose_kernel
from seqmill.model.esm2 import rope_tables
from seqmill.model.kernels import compiled
from seqmill.model.pack import Pack
from seqmill.spec.task import ATTENTIONS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
X86 = platform.machine() == "x86_64"
LENGTHS = [1024, 350, 350, 350, 129, 64, 63, 33, 32, 31, 17, 16, 15, 8, 7, 3, 3, 2, 1]
HEAD_DIMS = (16, 24, 32, 64, 128)
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
CASES = [pytest.param("sdpa", dtype, tolerance) for dtype, tolerance in TOLERANCES.items()]
for name, compiled_kernel in compiled.KERNELS.items():
    unusable = pytest.mark.skipif(bool(compiled.why_not(name)), reason=f"{name}: {compiled.why_not(name)}")
    CASES.append(pytest.param(name, compiled_kernel.dtype, TOLERANCES[compiled_kernel.dtype], marks=unusable))
SDPA_BFLOAT16, OUR_CASES = CASES[1], CASES[len(TOLERANCES) :]
needs_both_widths = pytest.mark.skipif(
    bool(compiled.why_not("avx512") or compiled.why_not("avx2")), reason="needs kernels avx512 and avx2"
)
# Stand-ins for packages: their published signatures, with PyTorch's attention behind them.
FLASH_ATTN_2 = """
from stand_in import dense
def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                           deterministic=False, return_attn_probs=False, block_table=None):
    return dense(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
"""
FLASH_ATTN_3 = """
from stand_in import dense
def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
                           seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
                           v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=0,
                           pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False):
    assert num_splits == 1
    return dense(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale), None
"""
STAND_IN = """
import torch
from torch.nn.functional import scaled_dot_product_attention as attention
def dense(q, k, v, cu_q, cu_k, max_q, max_k, scale):
    assert cu_q is cu_k and cu_q.dtype == torch.int32 and max_q == max_k == int(cu_q.diff().max())
    spans = [slice(*span) for span in zip(cu_q[:-1].tolist(), cu_q[1:].tolist())]
    each = [attention(*(t[span].transpose(0, 1) for t in (q, k, v)), scale=scale).transpose(0, 1) for span in spans]
    return torch.cat(each)
"""


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
        # The angles are in float32 as in fair-esm, because they are part of the model.
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
    """Queries and keys of 1e3, as in outlier channels, give scores of 1e6 and an almost one-hot softmax."""
    pack = make_pack([200, 33])
    qkv = make_qkv(pack, 2, 16, dtype)
    qkv[:, :2] *= 1000
    found = run(kernel, qkv, pack)
    assert found.isfinite().all()
    # Each output is the value whose key has the largest score; rounding of scores may swap near ties.
    expected = written_out(qkv, pack)
    close = ((found - expected).abs() < 0.02).all(-1).double().mean().item()
    assert close >= (1.0 if dtype == torch.float32 else 0.93)


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize(("kernel", "dtype", "tolerance"), [SDPA_BFLOAT16, *OUR_CASES])
def test_a_nan_affects_only_its_own_sequence(kernel: str, dtype: torch.dtype, tolerance: float, part: int) -> None:
    pack = make_pack([40, 17, 9])
    qkv = make_qkv(pack, 2, 16, dtype)
    qkv[45, part, 1, 3] = float("nan")
    first, second, third = run(kernel, qkv, pack).split([40, 17, 9])
    assert first.isfinite().all()
    assert third.isfinite().all()
    assert second[5].isnan().any()  # the query's own row; all rows for a key or a value
    assert second.isnan().any(dim=1).all() == (part > 0)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("kernel", "dtype", "tolerance"), OUR_CASES)
def test_our_kernels_give_a_sequence_the_same_bits_in_any_pack(
    kernel: str, dtype: torch.dtype, tolerance: float, head_dim: int
) -> None:
    pack = make_pack(LENGTHS)
    qkv = make_qkv(pack, 2, head_dim, dtype)
    together = run(kernel, qkv, pack).split(LENGTHS)
    for sequence, expected in zip(qkv.split(LENGTHS), together, strict=True):
        alone = run(kernel, sequence.contiguous(), make_pack([len(sequence)]))
        assert torch.equal(alone, expected)


@needs_both_widths
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_float32_has_the_same_bits_on_avx2_and_avx512(head_dim: int) -> None:
    pack = make_pack(LENGTHS)
    qkv = make_qkv(pack, 3, head_dim, torch.float32)
    assert torch.equal(run("avx2", qkv, pack), run("avx512", qkv, pack))


def test_the_fastest_of_our_kernels_is_chosen() -> None:
    for dtype in TOLERANCES:
        usable = [name for name, kernel in compiled.KERNELS.items() if kernel.dtype == dtype]
        usable = [name for name in usable if not compiled.why_not(name)]
        assert choose_kernel(CPU, dtype, 16) == [*usable, "sdpa"][0]
        assert choose_kernel(CPU, dtype, 48) == "sdpa"


@pytest.fixture
def flash_attn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins for the packages of FlashAttention 2 and 3."""
    sources = {"stand_in": STAND_IN, "flash_attn": FLASH_ATTN_2, "flash_attn_interface": FLASH_ATTN_3}
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    attention._packed_function.cache_clear()
    yield
    attention._packed_function.cache_clear()
    for name in sources:
        sys.modules.pop(name, None)


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Sets the compute capability that torch reports."""
    return lambda *found: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize("kernel", ["flash_attn_2", "flash_attn_3"])
def test_flash_attention_is_called_with_its_published_signature(kernel: str) -> None:
    pack = make_pack([40, 17, 9])
    qkv = make_qkv(pack, 2, 32, torch.float16)
    found, expected = run(kernel, qkv, pack), written_out(qkv, pack)
    assert ((found - expected).norm() / expected.norm()).item() < 8e-4


def test_the_names_match_the_kernels_and_import_without_torch() -> None:
    assert ATTENTIONS[0] == "auto"
    assert set(ATTENTIONS[1:]) == {*FASTEST_FIRST, *alibi.FASTEST_FIRST}
    code = "import sys; from seqmill.spec.task import ATTENTIONS; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SCRIPTS)}, check=True)


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize(
    ("found", "dtype", "head_dim", "expected"),
    [
        ((9, 0), torch.bfloat16, 64, "flash_attn_3"),
        ((9, 0), torch.bfloat16, 128, "flash_attn_3"),
        ((9, 0), torch.bfloat16, 32, "varlen"),
        ((9, 0), torch.float16, 64, "varlen"),
        ((8, 6), torch.bfloat16, 64, "varlen"),
        ((10, 0), torch.float16, 64, "varlen"),
        ((9, 0), torch.float32, 64, "sdpa"),
        ((7, 5), torch.float16, 64, "sdpa"),
    ],
)
def test_auto_chooses_the_fastest_kernel_of_the_gpu(
    capability: Callable[[int, int], None], found: tuple[int, int], dtype: torch.dtype, head_dim: int, expected: str
) -> None:
    capability(*found)
    assert choose_kernel(CUDA, dtype, head_dim) == choose_kernel(CUDA, dtype, head_dim, "auto") == expected


@pytest.mark.usefixtures("flash_attn")
def test_flash_attention_3_is_still_used_where_it_is_requested_or_the_only_one(
    capability: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    capability(9, 0)
    assert choose_kernel(CUDA, torch.float16, 16, "flash_attn_3") == "flash_attn_3"
    installed = attention.why_not
    missing = {"varlen": "missing", "flash_attn_2": "missing"}
    monkeypatch.setattr(attention, "why_not", lambda name, *found: missing.get(name) or installed(name, *found))
    assert choose_kernel(CUDA, torch.bfloat16, 16) == choose_kernel(CUDA, torch.float16, 64) == "flash_attn_3"


@pytest.mark.usefixtures("flash_attn")
def test_a_requested_kernel_is_used(capability: Callable[[int, int], None]) -> None:
    capability(9, 0)
    assert choose_kernel(CPU, torch.bfloat16, 16, "sdpa") == "sdpa"
    for name in ("sdpa", "varlen", "flash_attn_2", "flash_attn_3"):
        assert choose_kernel(CUDA, torch.bfloat16, 64, name) == name


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "head_dim", "reason"),
    [
        ("flash_attn_4", CPU, torch.bfloat16, 64, "'flash_attn_4' is not known; use one of auto, amx, avx512_bf16"),
        ("varlen", CPU, torch.bfloat16, 64, "varlen can't be used: it runs on a CUDA device, and the device is cpu"),
        ("flash_attn_2", CPU, torch.bfloat16, 64, "the device is cpu"),
        ("avx2", CUDA, torch.float32, 64, "it runs on a CPU, and the device is cuda"),
        ("neon" if X86 else "avx2", CPU, torch.float32, 64, "the processor has no (asimd|avx2, fma)"),
        ("triton", CUDA, torch.bfloat16, 64, "triton can't be used: it adds biases to the scores"),
        ("avx512_bf16", CPU, torch.float16, 64, "it computes in bfloat16, and the precision is float16"),
        ("avx512_bf16", CPU, torch.bfloat16, 48, "it has head dimensions 16, 24, 32, 64, 128, and the model's is 48"),
        ("varlen", CUDA, torch.float32, 64, "it computes in bfloat16 or float16, and the precision is float32"),
        ("varlen", CUDA, torch.bfloat16, 20, "multiples of 8 up to 256; the model's is 20"),
        ("varlen", CUDA, torch.bfloat16, 64, "it needs compute capability 8.0, and the GPU has 7.5"),
        ("flash_attn_3", CUDA, torch.bfloat16, 64, "it needs compute capability 9.0 .*, and the GPU has 7.5"),
    ],
)
def test_a_kernel_that_cannot_be_used_says_why(
    capability: Callable[[int, int], None],
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    reason: str,
) -> None:
    capability(7, 5)
    with pytest.raises(SeqmillError, match=reason):
        choose_kernel(device, dtype, head_dim, requested)


@pytest.mark.parametrize("source", ["raise ImportError('undefined symbol')", "def something_else(): ..."])
@pytest.mark.usefixtures("flash_attn")
def test_auto_skips_a_package_that_does_not_load_and_a_request_names_it(
    tmp_path: Path, capability: Callable[[int, int], None], source: str
) -> None:
    capability(9, 0)
    (tmp_path / "flash_attn_interface.py").write_text(source)
    assert choose_kernel(CUDA, torch.bfloat16, 64) == "varlen"
    with pytest.raises(
        SeqmillError, match=r"flash_attn_interface can't be imported \((undefined symbol|.*has no attr)"
    ):
        choose_kernel(CUDA, torch.bfloat16, 64, "flash_attn_3")


def test_pytorchs_kernel_is_used_without_a_compiler(tmp_path: Path) -> None:
    code = (
        "import logging, torch; logging.basicConfig()\n"
        "from seqmill.model.attention import choose_kernel\n"
        "print(choose_kernel(torch.device('cpu'), torch.bfloat16, 16))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "XDG_CACHE_HOME": str(tmp_path), "PATH": "", "CC": "none"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "sdpa"
    if processor()[1] & {"avx2", "asimd"}:
        assert "no C compiler found" in done.stderr


@pytest.mark.full
@needs_both_widths
def test_processes_that_compile_at_once_share_one_library(tmp_path: Path) -> None:
    code = "from seqmill.model.kernels import compiled; assert compiled.load('avx2') is not None"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "XDG_CACHE_HOME": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(4)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    assert len(list((tmp_path / "seqmill").iterdir())) == 1


def test_pooling_by_segments_equals_pooling_by_runs() -> None:
    """The pooling for CUDA, run on the CPU."""
    pack = make_pack(LENGTHS[:-1])
    hidden = torch.randn(len(pack.tokens), 48, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    by_hand = torch.stack([part[1:-1].mean(0) for part in hidden.split(pack.lengths.tolist())])
    kept = [number for number, length in enumerate(LENGTHS[:-1]) if length > 2]
    for found in (mean_over_residues(hidden, pack), _by_segments(hidden, pack, 1, 1)):
        assert torch.allclose(found[kept], by_hand[kept], rtol=1e-12, atol=1e-12)


def test_the_pieces_of_a_pack_make_up_the_pack() -> None:
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
