"""float16: the rotation kernel carries an overflow of queries or keys into the values, as `attention.show_overflow`.

The checks (check_*) run in Triton's interpreter, in a separate pytest session, see `triton_checks`.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from seqmill.model.attention import attend, rotate, show_overflow
from seqmill.model.esm2 import rope_tables
from seqmill.model.kernels import fused
from seqmill.model.pack import Pack
from triton_checks import compiled, run_in_the_interpreter

LENGTHS = [18, 17, 5]  # an overflow is planted in the second sequence
SHAPES = [(20, 16), (5, 24), (3, 64)]
PLACES = [18, 26, 34]  # the first, a middle and the last token of the second sequence
VALUES = [float("inf"), float("-inf"), float("nan")]
KEYS = 8  # in a block of the online softmax below
Marked = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def test_the_kernel_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run_in_the_interpreter(__file__)


def test_the_check_costs_no_memory_access_but_where_there_is_an_overflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for float16, the kernel loads no more than for bfloat16, and only its stores of NaN are added."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows, columns, warps = fused.rotation_blocks(20, 64)
    constants = {"num_heads": 20, "half": 32, "rows": rows, "columns": columns, "has_norms": False}
    loads, stores = {}, {}
    for kind in ("*bf16", "*fp16"):
        pointers = {"qkv": kind, "cos": "*fp32", "sin": "*fp32", "positions": "*i64"}
        ptx = compiled(
            fused._rotate,
            pointers | {"q_weight": "*fp32", "k_weight": "*fp32"},
            {"eps": "fp32"},
            constants,
            90,
            {"num_warps": warps},
        )
        loads[kind], stores[kind] = ptx.count("ld.global"), ptx.count("st.global")
    assert loads["*fp16"] == loads["*bf16"]
    assert stores["*fp16"] > stores["*bf16"]


def make_pack(lengths: list[int]) -> Pack:
    return Pack.from_tokens(np.zeros(sum(lengths), np.uint8), np.array(lengths, np.int64))


def make_qkv(num_heads: int, head_dim: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(sum(LENGTHS), 3, num_heads, head_dim, generator=generator).to(dtype)


def tables(head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *rope_tables(max(LENGTHS), head_dim, torch.float32), make_pack(LENGTHS).positions


def eager(qkv: torch.Tensor) -> Marked:
    cos, sin, positions = tables(qkv.shape[-1])
    q, k = rotate(qkv[:, :2], cos[positions], sin[positions]).to(qkv.dtype).unbind(1)
    return q, k, show_overflow(q, k, qkv[:, 2])


def by_kernel(qkv: torch.Tensor) -> Marked:
    rotated = qkv.clone()
    fused.rotate(rotated, *tables(qkv.shape[-1]))
    q, k, v = rotated.unbind(1)
    return q, k, v


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize(("num_heads", "head_dim"), SHAPES)
def check_the_same_values_become_nan_as_in_the_eager_form(
    num_heads: int, head_dim: int, part: int, value: float
) -> None:
    qkv = make_qkv(num_heads, head_dim)
    qkv[PLACES, part, num_heads - 1, torch.tensor([0, head_dim // 2 - 1, head_dim - 1])] = value
    qkv[3, 2, 0, 1] = float("inf")  # an overflow of a value itself
    (q, k, v), (expected_q, expected_k, expected_v) = by_kernel(qkv), eager(qkv)
    assert v.isnan().sum() == expected_v.isnan().sum() >= 3
    torch.testing.assert_close(v, expected_v, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(q, expected_q, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(k, expected_k, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("part", [0, 1])
def check_an_overflow_of_the_rotation_itself_is_seen(part: int) -> None:
    """60,000 x cos + 60,000 x sin is beyond 65,504 at position 1."""
    qkv = make_qkv(3, 16)
    qkv[19, part, 2, [0, 8]] = 60_000
    v, expected = by_kernel(qkv)[2], eager(qkv)[2]
    assert expected.isnan().any()
    torch.testing.assert_close(v, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def check_values_of_other_precisions_keep_their_bits(dtype: torch.dtype) -> None:
    qkv = make_qkv(3, 16, dtype)
    qkv[19, :2, 1, 4] = float("inf")
    assert torch.equal(by_kernel(qkv)[2], qkv[:, 2])


def online_softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, nan_max: bool, clamp: bool) -> torch.Tensor:
    """Attention of one sequence and head as FlashAttention computes it, in blocks of keys.

    Versions differ in what happens to a NaN in the scores: the running maximum passes over it (fmaxf) or keeps it, and
    an exponential by polynomial clamps its argument, so that NaN becomes a weight of almost 0.
    """
    q, k, v = (x.float() for x in (q, k, v))
    maximum = torch.maximum if nan_max else torch.fmax
    running, total = torch.full((len(q),), -torch.inf), torch.zeros(len(q))
    sums = torch.zeros(len(q), v.shape[1])
    for keys, values in zip(k.split(KEYS), v.split(KEYS), strict=True):
        scores = q @ keys.T * q.shape[1] ** -0.5
        seen = scores if nan_max else scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        new = maximum(running, seen.amax(1))
        base = torch.where(new == -torch.inf, 0.0, new)
        power = torch.fmax(scores - base[:, None], torch.tensor(-100.0)) if clamp else scores - base[:, None]
        weights = power.exp()
        shrink = (running - base).exp()
        total, sums, running = total * shrink + weights.sum(1), sums * shrink[:, None] + weights @ values, new
    # As in FlashAttention 3: a sum that is 0 or NaN scales by 0.
    return sums * torch.where((total == 0) | total.isnan(), 0.0, 1 / total)[:, None]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("place", PLACES)
def check_every_vector_of_the_sequence_becomes_nan_in_any_online_softmax(place: int, part: int, value: float) -> None:
    """0 x NaN is NaN, so a NaN among the values reaches every query, whatever became of the scores."""
    qkv = make_qkv(1, 16)
    qkv[place, part, 0, 3] = value
    marked = [x[:, 0].split(LENGTHS) for x in by_kernel(qkv)]
    for nan_max, clamp in itertools.product((False, True), repeat=2):
        for sequence, parts in enumerate(zip(*marked, strict=True)):
            found = online_softmax(*parts, nan_max, clamp)
            assert found.isnan().any(1).all() if sequence == 1 else found.isfinite().all()


def check_without_the_mark_an_overflow_is_finite_and_wrong() -> None:
    """The reason for it: scores of -inf, where a sum overflowed, are weights of 0."""
    q, k, v = make_qkv(1, 16).abs()[:9, :, 0].unbind(1)
    k[4] = float("-inf")
    assert online_softmax(q, k, v, False, False).isfinite().all()
    assert online_softmax(q, k, show_overflow(q, k, v), False, False).isnan().all()


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize(("num_heads", "head_dim"), SHAPES[1:])
def check_attention_shows_it_in_every_vector_of_its_sequence_and_in_no_other(
    num_heads: int, head_dim: int, part: int, value: float
) -> None:
    """With PyTorch's kernel of the CPU, which gives zeros for some infinite scores."""
    pack = make_pack(LENGTHS)
    cos, sin, _ = tables(head_dim)
    qkv = make_qkv(num_heads, head_dim)
    clean = attend("sdpa", qkv.clone(), cos, sin, pack, fuse=True).split(LENGTHS)
    qkv[26, part, 1, 3] = value
    first, second, third = attend("sdpa", qkv, cos, sin, pack, fuse=True).split(LENGTHS)
    assert torch.equal(first, clean[0])
    assert torch.equal(third, clean[2])
    assert not second.isfinite().all(1).any()
