"""In Triton's interpreter on the CPU, products with epilogues agree with float64, and their rows with any company.

The checks (check_*) run in a separate pytest session, see `triton_checks`. Each runs with descriptors, as on sm_90, and
with pointers, as on sm_80. `tests/rehearsal/test_gemm_machine_code.py` has the machine code.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from seqmill.model.attention import attend_rotated, rotate
from seqmill.model.elementwise import EAGER, TRITON
from seqmill.model.encoder import make_encoder
from seqmill.model.esm2 import ESM2, rope_tables
from seqmill.model.kernels import gemm_triton
from seqmill.model.layers import TORCH, Linear
from seqmill.model.pack import Pack
from seqmill.model.weights import Weights, untrained_tensors
from seqmill.spec.architectures import Esm2Architecture
from triton_checks import run_in_the_interpreter, widen_bfloat16_products

# The interpreter truncates float32 to bfloat16 and a GPU rounds, so errors reach one step, not half a step.
STEPS = {torch.float16: 2**-11, torch.bfloat16: 2**-7}
DTYPES = pytest.mark.parametrize("dtype", list(STEPS))
DIMS = {16: 320, 24: 480, 32: 640, 64: 1280, 128: 5120}  # of ESM-2's models by head dimension; 64 has 2,560, too
SMALL = Esm2Architecture(num_layers=2, hidden_dim=72, num_heads=3)  # its depth is not a multiple of a step


@pytest.mark.full
def test_the_products_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run_in_the_interpreter(__file__)


def test_products_are_pytorchs_unless_asked_for() -> None:
    weights = Weights(SMALL, untrained_tensors(SMALL), "", trained=False)
    model = make_encoder(weights, torch.bfloat16, 16, torch.device("cpu"))
    assert {module.products for module in model.modules() if isinstance(module, Linear)} == {TORCH}


def test_the_switch_reaches_the_products_that_have_an_epilogue() -> None:
    model = ESM2(SMALL, untrained_tensors(SMALL), torch.bfloat16, 16, products=TRITON)
    found = {name: module.products for name, module in model.layers[1].named_modules() if isinstance(module, Linear)}
    assert found == {"qkv": TRITON, "out": TORCH, "fc1": TRITON, "fc2": TORCH}


def test_the_reason_is_given_if_the_kernels_can_not_run() -> None:
    why_not, cpu, cuda = gemm_triton.why_not, torch.device("cpu"), torch.device("cuda")
    assert why_not(cpu, torch.bfloat16, 64) == "they run on a CUDA device, and the device is cpu"
    assert why_not(cuda, torch.float32, 64) == "they compute in bfloat16 or float16, and the precision is float32"


@pytest.fixture(params=[80, 90])
def _gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    widen_bfloat16_products(monkeypatch)
    monkeypatch.setattr(gemm_triton, "_gpu", lambda device: (request.param, 3))


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(rows: int, columns: int, depth: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    weight = normal(columns, depth, seed=2) * depth**-0.5
    return normal(rows, depth).to(dtype), weight.to(dtype), normal(columns, seed=3).to(dtype)


def step(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the largest possible rounding error of each value in `dtype`."""
    return values.abs() * STEPS[dtype] + 1e-5


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.linear(x.double(), weight.double(), bias.double())


def exact_rotation(product: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int) -> torch.Tensor:
    qkv = product.view(len(product), 3, -1, head_dim)
    return torch.cat((rotate(qkv[:, :2], cos.double(), sin.double()), qkv[:, 2:]), dim=1)


@pytest.mark.usefixtures("_gpu")
@DTYPES
@pytest.mark.parametrize(("columns", "depth"), [(640, 1280), (1440, 72), (72, 480), (300, 5120)])
def check_a_product(columns: int, depth: int, dtype: torch.dtype) -> None:
    x, weight, bias = factors(129, columns, depth, dtype)
    expected = exact(x, weight, bias)
    found = gemm_triton.linear(x, weight, bias)
    assert found.dtype == dtype
    assert ((found - expected).abs() <= step(expected, dtype)).all()
    without = gemm_triton.linear(x, weight, None)
    assert ((without - (expected - bias)).abs() <= step(expected - bias, dtype)).all()


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("dim", [*DIMS.values(), 2560])
def check_gelu_at_the_shapes_of_every_model(dim: int) -> None:
    x, weight, bias = factors(5, 4 * dim, dim, torch.float16)
    expected = F.gelu(exact(x, weight, bias))
    found = gemm_triton.linear(x, weight, bias, gelu=True)
    assert found.shape == (5, 4 * dim)
    assert ((found - expected).abs() <= step(expected, torch.float16)).all()


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(("head_dim", "dim"), [*DIMS.items(), (64, 2560)])
def check_the_rotation_at_the_shapes_of_every_model(head_dim: int, dim: int) -> None:
    x, weight, bias = factors(5, 3 * dim, dim, torch.float16)
    cos, sin = rope_tables(1000, head_dim, torch.float32)
    positions = torch.tensor([999, 0, 1, 2, 500])
    expected = exact_rotation(exact(x, weight, bias), cos[positions], sin[positions], head_dim)
    found = gemm_triton.rotated_qkv(x, weight, bias, cos, sin, positions, head_dim)
    assert found.shape == (5, 3, dim // head_dim, head_dim)
    assert ((found - expected).abs() <= step(expected, torch.float16)).all()


@pytest.mark.usefixtures("_gpu")
@DTYPES
@pytest.mark.parametrize(("num_heads", "head_dim"), [(20, 16), (20, 24), (3, 32), (5, 64), (1, 128)])
def check_rotation_beyond_one_tile(num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Tiles with queries and keys, with keys and values, and rows past the end."""
    x, weight, bias = factors(261, 3 * num_heads * head_dim, 64, dtype)
    cos, sin = rope_tables(300, head_dim, torch.float32)
    positions = torch.arange(261) % 170
    expected = exact_rotation(exact(x, weight, bias), cos[positions], sin[positions], head_dim)
    found = gemm_triton.rotated_qkv(x, weight, bias, cos, sin, positions, head_dim)
    # A rotated value is a difference; its float32 factors have errors of their own.
    allowed = step(expected, dtype) + 2**-20 * expected.abs().amax(-1, keepdim=True)
    assert ((found - expected).abs() <= allowed).all()


@pytest.mark.usefixtures("_gpu")
def check_gelu_rounds_once() -> None:
    """The separate kernel rounds its argument first; beyond that rounding this one is nearer to float64."""
    x, weight, bias = factors(64, 320, 320, torch.float16)
    expected = F.gelu(exact(x, weight, bias))
    fused = (gemm_triton.linear(x, weight, bias, gelu=True) - expected).norm()
    assert fused < 0.9 * (F.gelu(exact(x, weight, bias).half()) - expected).norm()


def check_the_polynomial_of_gelu() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def gelu(x_start: tl.tensor, y_start: tl.tensor, block: tl.constexpr) -> None:
        place = tl.program_id(0) * block + tl.arange(0, block)
        tl.store(y_start + place, gemm_triton._gelu(tl.load(x_start + place)))

    edges = torch.tensor([0.0, -0.0, 1e-30, 65504.0, -65504.0, 1e20, -1e20, float("inf"), float("-inf"), float("nan")])
    x = torch.cat((torch.linspace(-12, 12, 2**18 - 10), edges))
    y = torch.empty_like(x)
    gelu[(4,)](x, y, 2**16)
    exact = F.gelu(x.double())
    finite, found = y[:-3].double(), exact[:-3]
    assert ((finite - found).abs() <= 1.5e-7 * x[:-3].abs().double().clamp(min=1)).all()
    within = (x[:-3] > -4) & (found != 0)
    assert ((finite - found).abs()[within] <= 8e-6 * found.abs()[within]).all()
    assert not y[-3:].isfinite().any()


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def check_what_is_not_finite_shows_in_its_row_and_in_no_other(value: float) -> None:
    x, weight, bias = factors(130, 72, 80, torch.float16)
    x[128, 79] = value
    cos, sin = rope_tables(130, 24, torch.float32)
    for found in (
        gemm_triton.linear(x, weight, bias),
        gemm_triton.linear(x, weight, bias, gelu=True),
        gemm_triton.rotated_qkv(x, weight, bias, cos, sin, torch.arange(130), 24).flatten(1),
    ):
        assert not found[128].isfinite().any()
        assert found[[*range(128), 129]].isfinite().all()


@pytest.mark.usefixtures("_gpu")
@DTYPES
def check_a_row_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    x, weight, bias = factors(300, 3 * 80, 480, dtype)
    cos, sin = rope_tables(300, 16, torch.float32)
    positions = torch.arange(300)

    def rows(first: int, end: int) -> list[torch.Tensor]:
        part, places = x[first:end].contiguous(), positions[first:end]
        return [
            gemm_triton.linear(part, weight, bias, gelu=True),
            gemm_triton.rotated_qkv(part, weight, bias, cos, sin, places, 16),
        ]

    together = rows(0, 300)
    for first, end in ((0, 1), (299, 300), (150, 151), (37, 137), (0, 100), (200, 300)):
        for found, expected in zip(rows(first, end), together, strict=True):
            assert torch.equal(found, expected[first:end])


@pytest.mark.usefixtures("_gpu")
def check_an_overflow_of_float16_shows_in_its_sequence() -> None:
    """A query of 70,000 is infinite in float16, its weights could be zeros: attention must give NaN."""
    x, weight, _ = factors(9, 3 * 32, 64, torch.float16)
    bias = torch.zeros(3 * 32, dtype=torch.float16)
    x[4, 0], weight[3, 0] = 1e3, 80.0
    cos, sin = rope_tables(9, 16, torch.float32)
    pack = make_pack([3, 4, 2])
    qkv = gemm_triton.rotated_qkv(x, weight, bias, cos, sin, pack.positions, 16)
    assert qkv[4, 0].isinf().any()
    rows = attend_rotated("sdpa", qkv, pack).isfinite().all(dim=1)
    assert rows.tolist() == [True] * 3 + [False] * 4 + [True] * 2


def make_pack(lengths: list[int]) -> Pack:
    tokens = np.random.default_rng(2).integers(4, 24, sum(lengths)).astype(np.uint8)
    return Pack.from_tokens(tokens, np.array(lengths, np.int64))


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("elementwise", [EAGER, TRITON])
@DTYPES
def check_the_forward(dtype: torch.dtype, elementwise: str) -> None:
    """The error is at most that of the eager form, or twice that where the interpreter truncates."""
    pack = make_pack([11, 11, 7, 3])
    tensors = untrained_tensors(SMALL)
    eager = ESM2(SMALL, tensors, dtype, 16)(pack)
    found = ESM2(SMALL, tensors, dtype, 16, elementwise=elementwise, products=TRITON)(pack)
    exact = ESM2(SMALL, tensors, torch.float64, 16)(pack)
    off, eagerly_off = ((states - exact).norm().item() for states in (found, eager))
    print(f"{dtype} {elementwise}: {off / eagerly_off:.2f} times as far")
    assert off < (2 if dtype == torch.bfloat16 else 1.1) * eagerly_off
    assert not torch.equal(found, eager)  # otherwise both ran the same code
