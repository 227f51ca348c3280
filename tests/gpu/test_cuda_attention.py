"""Attention on CUDA, with a rotation and with linear biases, compared with the CPU. Skipped without a CUDA device."""

import pytest
import torch
from on_cuda import (
    ALIBI_KERNELS,
    KERNELS,
    LENGTHS,
    TOLERANCES,
    cuda,
    make_pack,
    needs_cuda,
    on,
    skip_unless_usable_with_biases,
)

from seqmill.model import alibi, relative
from seqmill.model.attention import attend, why_not
from seqmill.model.elementwise import EAGER, TRITON
from seqmill.model.esm2 import rope_tables
from seqmill.model.pack import Pack
from sequences import relative_error

pytestmark = needs_cuda


def skip_unless_usable(kernel: str, dtype: torch.dtype, head_dim: int) -> None:
    if reason := why_not(kernel, cuda(), dtype, head_dim):
        pytest.skip(f"{kernel}: {reason}")


@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 128])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("elementwise", [EAGER, TRITON])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_agrees_with_float32_on_the_cpu(
    kernel: str, elementwise: str, dtype: torch.dtype, head_dim: int
) -> None:
    skip_unless_usable(kernel, dtype, head_dim)
    pack = make_pack(LENGTHS)
    qkv = torch.randn(sum(LENGTHS), 3, 4, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    cos, sin = rope_tables(1024, head_dim, torch.float32)
    expected = attend("sdpa", qkv.float(), cos, sin, pack).numpy()
    found = (
        attend(kernel, qkv.cuda(), cos.cuda(), sin.cuda(), on(cuda(), pack), elementwise == TRITON)
        .float()
        .cpu()
        .numpy()
    )
    assert relative_error(found, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("head_dim", [16, 24, 64, 128])
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "sdpa"])
def test_a_packed_kernel_gives_a_sequence_the_same_bits_in_any_pack(kernel: str, head_dim: int) -> None:
    skip_unless_usable(kernel, torch.bfloat16, head_dim)
    lengths = [1024, 700, 350, 33]
    qkv = torch.randn(sum(lengths), 3, 4, head_dim, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
    cos, sin = (table.cuda() for table in rope_tables(1024, head_dim, torch.float32))
    together = attend(kernel, qkv.clone(), cos, sin, on(cuda(), make_pack(lengths))).split(lengths)
    for sequence, expected in zip(qkv.split(lengths), together, strict=True):
        alone = attend(kernel, sequence.contiguous(), cos, sin, on(cuda(), make_pack([len(sequence)])))
        assert torch.equal(alone, expected)


def attend_with_biases(kernel: str, qkv: torch.Tensor, pack: Pack) -> torch.Tensor:
    exact = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    biases = alibi.make_biases(kernel, qkv.shape[2], int(pack.lengths.max()), exact)
    return alibi.attend(kernel, qkv, biases.to(qkv.device), pack)


@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 128])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("kernel", ALIBI_KERNELS)
def test_every_kernel_with_biases_agrees_with_float64_on_the_cpu(
    kernel: str, dtype: torch.dtype, head_dim: int
) -> None:
    skip_unless_usable_with_biases(kernel, dtype, head_dim)
    pack = make_pack(LENGTHS)
    qkv = torch.randn(sum(LENGTHS), 3, 12, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = attend_with_biases("sdpa", qkv.double(), pack).numpy()
    found = attend_with_biases(kernel, qkv.cuda(), on(cuda(), pack)).double().cpu().numpy()
    assert relative_error(found, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("kernel", [name for name in ALIBI_KERNELS if name != "sdpa"])
def test_a_kernel_with_biases_gives_a_sequence_the_same_bits_in_any_pack(kernel: str, dtype: torch.dtype) -> None:
    skip_unless_usable_with_biases(kernel, dtype, 64)
    lengths = [1024, 700, 350, 33, 1]
    qkv = torch.randn(sum(lengths), 3, 12, 64, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
    together = attend_with_biases(kernel, qkv, on(cuda(), make_pack(lengths))).split(lengths)
    for sequence, expected in zip(qkv.split(lengths), together, strict=True):
        alone = attend_with_biases(kernel, sequence.contiguous(), on(cuda(), make_pack([len(sequence)])))
        assert torch.equal(alone, expected)


def attend_by_position(kernel: str, qkv: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    weight = torch.randn(32, qkv.shape[2], generator=torch.Generator().manual_seed(2)).to(qkv.device)
    exact = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    biases = relative.make_biases(kernel, weight.to(exact), 128, max(lengths))
    return relative.attend(kernel, qkv, biases, on(qkv.device, make_pack(lengths)))


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("kernel", ["triton", "sdpa"])
def test_biases_by_relative_position_agree_with_float64_on_the_cpu(kernel: str, dtype: torch.dtype) -> None:
    if reason := relative.why_not(kernel, cuda(), dtype, 128):
        pytest.skip(f"{kernel}: {reason}")
    qkv = torch.randn(sum(LENGTHS), 3, 4, 128, generator=torch.Generator().manual_seed(1))
    qkv[:, 0] *= 128**-0.5
    qkv = qkv.to(dtype)
    expected = attend_by_position("sdpa", qkv.double(), LENGTHS).numpy()
    found = attend_by_position(kernel, qkv.cuda(), LENGTHS).double().cpu().numpy()
    assert relative_error(found, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_biases_by_relative_position_give_a_sequence_the_same_bits_in_any_pack(dtype: torch.dtype) -> None:
    if reason := relative.why_not("triton", cuda(), dtype, 128):
        pytest.skip(reason)
    lengths = [1024, 700, 350, 33, 1]
    qkv = torch.randn(sum(lengths), 3, 4, 128, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
    together = attend_by_position("triton", qkv, lengths).split(lengths)
    for sequence, expected in zip(qkv.split(lengths), together, strict=True):
        assert torch.equal(attend_by_position("triton", sequence.contiguous(), [len(sequence)]), expected)


def test_triton_attention_is_chosen_for_every_precision() -> None:
    for dtype in TOLERANCES:
        assert alibi.choose_kernel(cuda(), dtype, 64) == "triton"


def test_a_long_sequence_allocates_no_bias_matrix_on_the_gpu() -> None:
    """For 20,000 tokens the biases of one head would take 1.6 GB; the output takes 31 MB."""
    skip_unless_usable_with_biases("triton", torch.bfloat16, 64)
    qkv = torch.randn(20_000, 3, 12, 64, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
    pack = on(cuda(), make_pack([20_000]))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attend_with_biases("triton", qkv, pack)
    assert torch.cuda.max_memory_allocated() - before < 64e6
