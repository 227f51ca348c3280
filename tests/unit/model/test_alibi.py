"""Attention with linear biases agrees with softmax attention written out in float64 with a dense bias."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from dnabert_reference import slopes_written_out
from pipeline import SCRIPTS
from seqmill.model import alibi
from seqmill.model.alibi import attend, bias_table, slopes
from seqmill.model.pack import Pack

LENGTHS = [400, 129, 129, 129, 64, 33, 17, 16, 3, 2, 1, 1]
# The 12 heads of DNABERT-S: 2^-1 to 2^-8, then every second slope for 16 heads.
PUBLISHED_12 = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]
PUBLISHED_12 += [0.70710678, 0.35355339, 0.1767767, 0.08838835]

# One sequence of 20,000 tokens; the dense bias of its two heads would take 3.2 GB, and so would its scores.
LONG = """
import torch
import numpy as np
from seqmill.model.alibi import attend, bias_table
from seqmill.model.pack import Pack
torch.set_num_threads(1)
length = 20_000
pack = Pack.from_tokens(np.zeros(length, np.uint16), np.array([length]))
qkv = torch.randn(length, 3, 2, 8, generator=torch.Generator().manual_seed(1))
biases = bias_table(2, length, torch.float32)
attend("sdpa", qkv[:10], biases, Pack.from_tokens(np.zeros(10, np.uint16), np.array([10])))
def memory(name):  # in KB; getrusage starts with the parent process's peak
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
before = memory("VmRSS")  # the imports' own peak would hide it
found = attend("sdpa", qkv, biases, pack)
grown = memory("VmHWM") - before
query = 12_345
q, k, v = qkv.double().unbind(1)
distance = (torch.arange(length) - query).abs()
for head in range(2):
    scores = k[:, head] @ q[query, head] / 8 ** 0.5 - distance * 2.0 ** (-4 * (head + 1))
    expected = scores.softmax(0) @ v[:, head]
    assert torch.allclose(found[query, 8 * head : 8 * head + 8].double(), expected, atol=1e-5)
print(grown)
"""


def make_pack(lengths: list[int]) -> Pack:
    return Pack.from_tokens(np.zeros(sum(lengths), np.uint16), np.array(lengths, np.int64))


def make_qkv(pack: Pack, num_heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(len(pack.tokens), 3, num_heads, head_dim, generator=generator).to(dtype)


def written_out(qkv: torch.Tensor, pack: Pack) -> torch.Tensor:
    outputs = []
    slope = torch.tensor(slopes_written_out(qkv.shape[2]), dtype=torch.float64)[:, None, None]
    for sequence in qkv.double().split(pack.lengths.tolist()):
        q, k, v = sequence.unbind(1)
        places = torch.arange(len(q))
        scores = torch.einsum("qhd,khd->hqk", q, k) * qkv.shape[-1] ** -0.5
        scores -= slope * (places[:, None] - places).abs()
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))
    return torch.cat(outputs)


def test_the_slopes_of_the_published_model() -> None:
    assert slopes(12).tolist() == pytest.approx(PUBLISHED_12, rel=1e-7)


@pytest.mark.parametrize("num_heads", range(1, 41))
def test_the_slopes_of_any_number_of_heads(num_heads: int) -> None:
    expected = torch.tensor(slopes_written_out(num_heads), dtype=torch.float32)
    assert slopes(num_heads).tolist() == pytest.approx(expected.tolist(), rel=1e-7)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # The limit for float64 is that of its float32 biases.
    [(torch.float64, 5e-8), (torch.float32, 2e-6), (torch.bfloat16, 6e-3), (torch.float16, 8e-4)],
)
@pytest.mark.parametrize("num_heads", [12, 4, 1])
@pytest.mark.parametrize("max_biases", [alibi.MAX_BIASES, 5000, 1])
def test_agrees_with_attention_written_out(
    dtype: torch.dtype, tolerance: float, num_heads: int, max_biases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alibi, "MAX_BIASES", max_biases)
    pack = make_pack(LENGTHS)
    qkv = make_qkv(pack, num_heads, 16, dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    expected = written_out(qkv, pack)
    for max_tokens in (400, 1001):
        found = attend("sdpa", qkv, bias_table(num_heads, max_tokens, exact), pack)
        assert found.dtype == dtype
        for one, other in zip(found.split(LENGTHS), expected.split(LENGTHS), strict=True):
            assert ((one - other).norm() / other.norm()).item() < tolerance, len(one)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_nan_affects_only_its_own_sequence(part: int) -> None:
    pack = make_pack([40, 17, 9])
    qkv = make_qkv(pack, 2, 16, torch.bfloat16)
    qkv[45, part, 1, 3] = float("nan")
    first, second, third = attend("sdpa", qkv, bias_table(2, 40, torch.float32), pack).split([40, 17, 9])
    assert first.isfinite().all()
    assert third.isfinite().all()
    assert second[5].isnan().any()  # the query's own row; all rows for a key or a value
    assert second.isnan().any(dim=1).all() == (part > 0)


@pytest.mark.full
def test_a_long_sequence_needs_no_matrix_of_biases() -> None:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run([sys.executable, "-c", LONG], env=environment, capture_output=True, text=True, check=True)
    grown_mb = int(done.stdout) / 1024
    print(f"20,000 tokens: {grown_mb:.0f} MB")
    assert grown_mb < 200
