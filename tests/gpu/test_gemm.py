"""Products with epilogues on CUDA: agreement with float64, the same bits in any company, and the whole forward.

Skipped without a CUDA device. `tests/unit/model/test_gemm_kernels.py` has the same in Triton's interpreter.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from seqmill.model.attention import attend_rotated, choose_kernel, rotate
from seqmill.model.elementwise import TRITON
from seqmill.model.esm2 import ESM2, rope_tables
from seqmill.model.kernels import gemm_triton
from seqmill.model.layers import TORCH
from seqmill.model.pack import Pack
from seqmill.model.weights import untrained_tensors
from seqmill.spec.models import MODELS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

HALF_STEPS = {torch.float16: 2**-11, torch.bfloat16: 2**-8}  # the relative error of one rounding
DTYPES = pytest.mark.parametrize("dtype", list(HALF_STEPS))
SHAPES = [(16, 320), (24, 480), (32, 640), (64, 1280), (64, 2560), (128, 5120)]  # head dimension, width of ESM-2
ROWS = [1, 127, 128, 129, 5000]
LENGTHS = [1024, 700, 350, 350, 129, 64, 33, 16, 7, 3]


def cuda() -> torch.device:
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _usable() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the GPU's compute capability is below 8.0")


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, device=cuda(), generator=torch.Generator(cuda()).manual_seed(seed))


def factors(rows: int, columns: int, depth: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    weight = normal(columns, depth, seed=2) * depth**-0.5
    return normal(rows, depth).to(dtype), weight.to(dtype), normal(columns, seed=3).to(dtype)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.linear(x.double(), weight.double(), bias.double())


def exact_rotation(product: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int) -> torch.Tensor:
    qkv = product.view(len(product), 3, -1, head_dim)
    return torch.cat((rotate(qkv[:, :2], cos.double(), sin.double()), qkv[:, 2:]), dim=1)


def require_close(found: torch.Tensor, expected: torch.Tensor, product: torch.Tensor, depth: int) -> None:
    """Allow one rounding, and that tensor cores cut every sum of 16 products to 24 bits."""
    sums = depth / 16 * 2**-23 * product.abs().max()
    assert ((found - expected).abs() <= expected.abs() * HALF_STEPS[found.dtype] * 1.01 + sums).all()


def tables(head_dim: int, num_positions: int) -> list[torch.Tensor]:
    return [table.cuda() for table in rope_tables(num_positions, head_dim, torch.float32)]


@DTYPES
@pytest.mark.parametrize("head_dim", [16, 64])
def test_the_kernels_can_be_used(head_dim: int, dtype: torch.dtype) -> None:
    assert gemm_triton.why_not(cuda(), dtype, head_dim) == ""


@DTYPES
@pytest.mark.parametrize("dim", [dim for _, dim in SHAPES])
def test_products_agree_with_float64(dim: int, dtype: torch.dtype) -> None:
    for rows in ROWS:
        x, weight, bias = factors(rows, 4 * dim, dim, dtype)
        expected = exact(x, weight, bias)
        require_close(gemm_triton.linear(x, weight, bias), expected, expected, dim)
        require_close(gemm_triton.linear(x, weight, bias, gelu=True), F.gelu(expected), expected, dim)
    x, weight, bias = factors(300, dim, 4 * dim, dtype)
    expected = exact(x, weight, 0 * bias)
    require_close(gemm_triton.linear(x, weight, None), expected, expected, 4 * dim)


@DTYPES
@pytest.mark.parametrize(("head_dim", "dim"), SHAPES)
def test_rotated_products_agree_with_float64(head_dim: int, dim: int, dtype: torch.dtype) -> None:
    cos, sin = tables(head_dim, 1024)
    for rows in ROWS:
        x, weight, bias = factors(rows, 3 * dim, dim, dtype)
        positions = torch.arange(rows, device=cuda()) * 7 % 1024
        product = exact(x, weight, bias)
        expected = exact_rotation(product, cos[positions], sin[positions], head_dim)
        found = gemm_triton.rotated_qkv(x, weight, bias, cos, sin, positions, head_dim)
        assert found.dtype == dtype
        require_close(found, expected, product, dim)


@DTYPES
@pytest.mark.parametrize(("head_dim", "dim"), SHAPES)
def test_a_row_has_the_same_bits_in_any_company(head_dim: int, dim: int, dtype: torch.dtype) -> None:
    x, weight, bias = factors(20000, 3 * dim, dim, dtype)
    cos, sin = tables(head_dim, 20000)
    positions = torch.arange(20000, device=cuda())

    def rows(first: int, end: int) -> list[torch.Tensor]:
        part, places = x[first:end].contiguous(), positions[first:end]
        return [
            gemm_triton.linear(part, weight, bias),
            gemm_triton.linear(part, weight, bias, gelu=True),
            gemm_triton.rotated_qkv(part, weight, bias, cos, sin, places, head_dim),
        ]

    together = rows(0, 20000)
    for first, end in ((0, 1), (19999, 20000), (777, 778), (13, 113), (4000, 4300), (1, 20000)):
        for found, expected in zip(rows(first, end), together, strict=True):
            assert torch.equal(found, expected[first:end])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_in_its_row_and_in_no_other(value: float) -> None:
    x, weight, bias = factors(5000, 3 * 480, 480, torch.float16)
    x[4998, 479] = value
    cos, sin = tables(24, 5000)
    for found in (
        gemm_triton.linear(x, weight, bias),
        gemm_triton.linear(x, weight, bias, gelu=True),
        gemm_triton.rotated_qkv(x, weight, bias, cos, sin, torch.arange(5000, device=cuda()), 24).flatten(1),
    ):
        assert not found[4998].isfinite().any()
        assert found[[*range(4998), 4999]].isfinite().all()


def test_an_overflow_of_float16_shows_in_its_sequence() -> None:
    x, weight, _ = factors(9, 3 * 320, 320, torch.float16)
    x[4, 0], weight[3, 0] = 1e3, 80.0
    pack = make_pack([3, 4, 2])
    qkv = gemm_triton.rotated_qkv(x, weight, None, *tables(16, 9), pack.positions, 16)
    kernel = choose_kernel(cuda(), torch.float16, 16)
    rows = attend_rotated(kernel, qkv, pack).isfinite().all(dim=1)
    assert rows.tolist() == [True] * 3 + [False] * 4 + [True] * 2


def make_pack(lengths: list[int]) -> Pack:
    tokens = np.random.default_rng(5).integers(4, 24, sum(lengths)).astype(np.uint8)
    pack = Pack.from_tokens(tokens, np.array(lengths, np.int64))
    return Pack(pack.tokens.cuda(), pack.cu_seqlens.cuda(), pack.lengths)


@DTYPES
@pytest.mark.parametrize("name", ["esm2_t6_8M_UR50D", "esm2_t12_35M_UR50D", "esm2_t33_650M_UR50D"])
def test_the_forward_is_as_close_to_float64_as_with_pytorchs_products(name: str, dtype: torch.dtype) -> None:
    architecture, pack = MODELS[name], make_pack(LENGTHS)
    tensors = untrained_tensors(architecture)
    kernel = choose_kernel(cuda(), dtype, architecture.head_dim)

    def forward(products: str) -> torch.Tensor:
        return ESM2(architecture, tensors, dtype, 1024, kernel, TRITON, products).cuda()(pack)

    exact = ESM2(architecture, tensors, torch.float64, 1024).cuda()(pack)
    found, usual = forward(TRITON), forward(TORCH)
    off, usually_off = ((states - exact).norm().item() for states in (found, usual))
    assert off < 1.1 * usually_off
    assert not torch.equal(found, usual)  # otherwise both ran the same code
    assert torch.equal(found, forward(TRITON))
