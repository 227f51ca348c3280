"""Our C kernels' attention with biases by relative position agrees with the same written out in float64."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from seqmill.model.kernels import cpu
from seqmill.model.kernels.compiled import KERNELS, why_not

LENGTHS = [2048, 350, 129, 65, 64, 63, 33, 32, 31, 17, 16, 15, 3, 2, 1]
SHORT = LENGTHS[1:]
SPAN = 128
# Scores of 50 and more are rounded to 4e-6 in float32, and weights are their exponentials.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 3e-3}
OUR_KERNELS = pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param(name, KERNELS[name].dtype, marks=pytest.mark.skipif(bool(reason), reason=f"{name}: {reason}"))
        for name in KERNELS
        for reason in [why_not(name)]
    ],
)


def make_qkv(
    lengths: list[int], num_heads: int, head_dim: int, dtype: torch.dtype, spread: float = 1.0
) -> torch.Tensor:
    """Random queries, keys and values; `spread` is the standard deviation of the unscaled scores."""
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(sum(lengths), 3, num_heads, head_dim, generator=generator)
    qkv[:, :2] *= spread**0.5 / head_dim**0.25
    return qkv.to(dtype)


def make_biases(num_heads: int, span: int = SPAN, scale: float = 3.0) -> torch.Tensor:
    """Random biases: those of keys before and after a query have nothing in common."""
    return torch.randn(num_heads, 2 * span + 1, generator=torch.Generator().manual_seed(5)) * scale


def written_out(sequence: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """Return the attention output of one sequence in float64, one head at a time."""
    span = biases.shape[1] // 2
    places = torch.arange(len(sequence))
    distances = (places - places[:, None]).clamp(-span, span)  # of key j for query i: j - i
    heads = []
    for head, row in enumerate(biases.double()):
        q, k, v = sequence[:, :, head].double().unbind(1)
        heads.append((q @ k.T + row[span + distances]).softmax(-1) @ v)
    return torch.cat(heads, dim=1)


def run(kernel: str, qkv: torch.Tensor, biases: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return cpu.relative_attention(kernel, qkv, biases, np.array(lengths))


def worst_error(found: torch.Tensor, qkv: torch.Tensor, biases: torch.Tensor, lengths: list[int]) -> float:
    errors = []
    for one, sequence in zip(found.split(lengths), qkv.split(lengths), strict=True):
        other = written_out(sequence, biases)
        errors.append(((one - other).norm() / other.norm()).item())
    return max(errors)


@OUR_KERNELS
def test_agrees_with_attention_written_out(kernel: str, dtype: torch.dtype) -> None:
    qkv, biases = make_qkv(LENGTHS, 2, 128, dtype, spread=3.0), make_biases(2)
    found = run(kernel, qkv, biases, LENGTHS)
    assert found.dtype == dtype
    assert worst_error(found, qkv, biases, LENGTHS) < TOLERANCES[dtype]


@OUR_KERNELS
@pytest.mark.parametrize("head_dim", cpu.HEAD_DIMS)
def test_agrees_at_every_head_dimension(kernel: str, dtype: torch.dtype, head_dim: int) -> None:
    qkv, biases = make_qkv(SHORT, 3, head_dim, dtype), make_biases(3)
    assert worst_error(run(kernel, qkv, biases, SHORT), qkv, biases, SHORT) < TOLERANCES[dtype]


@OUR_KERNELS
@pytest.mark.parametrize("span", [0, 1, 5, 31, 32, 349, 350, 1000])
def test_agrees_whether_sequences_are_shorter_or_longer_than_the_span(
    kernel: str, dtype: torch.dtype, span: int
) -> None:
    qkv, biases = make_qkv(SHORT, 2, 32, dtype), make_biases(2, span)
    assert worst_error(run(kernel, qkv, biases, SHORT), qkv, biases, SHORT) < TOLERANCES[dtype]


@OUR_KERNELS
@pytest.mark.parametrize("spread", [20.0, 60.0])
def test_large_scores_keep_the_accuracy(kernel: str, dtype: torch.dtype, spread: float) -> None:
    """Scores of up to 4 spreads, as T5's unscaled ones, and biases of up to 40."""
    qkv, biases = make_qkv(SHORT, 2, 128, dtype, spread), make_biases(2, scale=10.0)
    assert worst_error(run(kernel, qkv, biases, SHORT), qkv, biases, SHORT) < TOLERANCES[dtype]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of memory")
@OUR_KERNELS
def test_memory_is_linear_in_the_length(kernel: str, dtype: torch.dtype) -> None:
    """A matrix of scores or biases of 12,000 tokens would take 288 MB or more."""

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(name))

    qkv, biases = make_qkv([12_000], 1, 16, dtype), make_biases(1)
    run(kernel, qkv[:64].contiguous(), biases, [64])
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = kilobytes("VmRSS")
    run(kernel, qkv, biases, [12_000])
    assert kilobytes("VmHWM") - before < 10_000


@OUR_KERNELS
def test_the_bias_is_of_the_key_relative_to_the_query(kernel: str, dtype: torch.dtype) -> None:
    """Without scores, a large bias at one distance makes each query's output the value at that distance."""
    qkv, biases = make_qkv([100], 1, 16, dtype), torch.zeros(1, 2 * 7 + 1)
    qkv[:, 0] = 0
    biases[0, 7 + 3] = 200.0  # three keys ahead
    assert torch.equal(run(kernel, qkv, biases, [100])[:97], qkv[3:, 2, 0])
    biases[0] = 0
    biases[0, 7 - 5] = 200.0  # five keys behind
    assert torch.equal(run(kernel, qkv, biases, [100])[5:], qkv[:95, 2, 0])


@OUR_KERNELS
@pytest.mark.parametrize("head_dim", [16, 128])
def test_a_sequence_has_the_same_bits_in_any_pack(kernel: str, dtype: torch.dtype, head_dim: int) -> None:
    qkv, biases = make_qkv(LENGTHS, 2, head_dim, dtype), make_biases(2)
    together = run(kernel, qkv, biases, LENGTHS).split(LENGTHS)
    for sequence, expected in zip(qkv.split(LENGTHS), together, strict=True):
        assert torch.equal(run(kernel, sequence.contiguous(), biases, [len(sequence)]), expected)


@pytest.mark.skipif(bool(why_not("avx512") or why_not("avx2")), reason="needs kernels avx512 and avx2")
@pytest.mark.parametrize("spread", [0.1, 60.0])
def test_float32_has_the_same_bits_on_avx2_and_avx512(spread: float) -> None:
    qkv, biases = make_qkv(SHORT, 3, 128, torch.float32, spread), make_biases(3)
    assert torch.equal(*(run(name, qkv, biases, SHORT) for name in ("avx2", "avx512")))


@OUR_KERNELS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_nonfinite_values_show_in_their_own_sequence_and_in_no_other(
    kernel: str, dtype: torch.dtype, part: int, value: float
) -> None:
    lengths = [300, 290, 9]
    qkv = make_qkv(lengths, 2, 64, dtype)
    qkv[580, part, 0, 3] = value
    first, second, third = run(kernel, qkv, make_biases(2), lengths).split(lengths)
    assert first.isfinite().all()
    assert third.isfinite().all()
    rows = second.isfinite().all(dim=1)
    assert not rows[280]
    assert rows.any() == (part == 0)  # the query's own row; all rows for a key or a value


def check_all_negative_scores_show(kernel: str, dtype: torch.dtype, part: int, length: int) -> None:
    qkv, biases = make_qkv([length], 1, 16, dtype), make_biases(1)
    qkv[:, :2] = 1
    qkv[0, part] = -float("inf")
    rows = run(kernel, qkv, biases, [length]).isfinite().any(dim=1)
    assert rows.tolist() == [False] + [part == 0] * (length - 1)
    qkv[:, 0], qkv[:, 1] = 1e30, -1e30  # the products overflow
    assert not run(kernel, qkv, biases, [length]).isfinite().any()


@OUR_KERNELS
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("length", [1, 40])
def test_an_overflow_that_makes_all_scores_negative_shows(
    kernel: str, dtype: torch.dtype, part: int, length: int
) -> None:
    """Weights of zero for all keys, or for the one key that overflowed, would be finite and wrong."""
    check_all_negative_scores_show(kernel, dtype, part, length)


@OUR_KERNELS
def test_a_nan_among_the_biases_shows_in_its_head(kernel: str, dtype: torch.dtype) -> None:
    qkv, biases = make_qkv([40, 9], 2, 16, dtype), make_biases(2, 20)
    biases[0, 20] = float("nan")
    heads = run(kernel, qkv, biases, [40, 9]).view(49, 2, 16)
    assert heads[:, 0].isnan().all()
    assert heads[:, 1].isfinite().all()
