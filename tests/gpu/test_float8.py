"""Float8 on a GPU against its emulation on the CPU. Skipped without a CUDA device of compute capability 8.9."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("esm", reason="fair-esm is not installed")

from families import PROTEINS, SMALL, SMALL_ESM2, WINDOWS, Family
from float8_cases import LENGTHS, exact, means, normal, odd_rows, pack_of
from pipeline import Run
from seqmill.embedding.monitor import gemm_peak
from seqmill.embedding.pooling import mean_over_residues, mean_over_tokens
from seqmill.model import alibi, attention
from seqmill.model.dnabert_s import DnabertS
from seqmill.model.elementwise import EAGER, TRITON
from seqmill.model.esm2 import ESM2, LAYER_NORM_EPS
from seqmill.model.float8 import FLOAT8, Scaled, make_linear, make_norm, product, round_rows
from seqmill.model.kernels import float8_triton
from seqmill.model.pack import Pack
from seqmill.model.weights import untrained_tensors
from seqmill.spec.architectures import Architecture
from seqmill.spec.models import MODELS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no CUDA device with float8"
)
# Hopper sums products in fewer bits than float32, and adds these sums up in float32.
SUM_ERROR = 2**-7


def on_gpu(rows: Scaled) -> Scaled:
    return Scaled(*(part.cuda() for part in rows))


@pytest.mark.parametrize("rows", [1, 2, 17, 300, 4096])
@pytest.mark.parametrize(("inputs", "outputs"), [(320, 960), (1280, 5120), (5120, 1280), (3072, 768), (64, 48)])
def test_products_are_those_of_the_emulation(rows: int, inputs: int, outputs: int) -> None:
    x, weight = round_rows(normal(rows, inputs)), round_rows(normal(outputs, inputs, seed=2))
    bias = normal(outputs, seed=3).bfloat16()
    for given in (bias, None):
        found = product(on_gpu(x), on_gpu(weight), None if given is None else given.cuda())
        expected = exact(x) @ exact(weight).T + (0 if given is None else given.double())
        assert found.dtype == torch.bfloat16
        assert (found.double().cpu() - expected).norm() / expected.norm() < SUM_ERROR


def test_a_row_that_is_not_finite_gives_nan_and_no_other_row_does() -> None:
    x = odd_rows(320, torch.float32)
    for rows in (Scaled(*float8_triton.round_rows(x.cuda())), on_gpu(round_rows(x))):
        y = product(rows, on_gpu(round_rows(normal(64, 320))), None)
        assert y[6:].isnan().all()
        assert y[:6].isfinite().all()


def test_a_row_has_the_same_bits_in_any_company() -> None:
    x, weight = round_rows(normal(300, 1280)), on_gpu(round_rows(normal(1280, 1280, seed=2)))
    other = Scaled(*(part.clone() for part in x))
    other.values[1:], other.scales[1:] = x.values[:-1], x.scales[:-1]
    assert torch.equal(product(on_gpu(x), weight, None)[0], product(on_gpu(other), weight, None)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 320, 1280, 5120, 10240, 20480])
def test_the_kernels_that_round_agree_with_their_eager_forms(width: int, dtype: torch.dtype) -> None:
    x = odd_rows(width, dtype)
    halves = x.float().chunk(2, dim=1)
    for options, y in (
        ({}, x.float()),
        ({"gelu": True}, F.gelu(x.float())),
        ({"gelu": True, "gated": True}, F.gelu(halves[0]) * halves[1]),
    ):
        found = Scaled(*(part.cpu() for part in float8_triton.round_rows(x.cuda(), **options)))
        agree(found, round_rows(y), y.isfinite().all(dim=1))


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("width", [320, 480, 768, 1280, 2560, 5120])
def test_the_norm_agrees_with_its_eager_form(width: int, post: bool) -> None:
    weights = {"n.weight": normal(width, seed=3), "n.bias": normal(width, seed=4)}
    eager, triton = (make_norm(weights, "n.", LAYER_NORM_EPS, torch.float32, FLOAT8, kind) for kind in (EAGER, TRITON))
    x, delta = normal(6, width), normal(6, width, seed=2).bfloat16()
    x[4, 1], x[5, 2] = torch.nan, torch.inf
    changed, on_cpu = x.cuda(), x.clone()
    if post:
        (changed, found), (on_cpu, expected) = triton.cuda().post(changed, delta.cuda()), eager.post(on_cpu, delta)
    else:
        found, expected = triton.cuda().pre(changed, delta.cuda()), eager.pre(on_cpu, delta)
    agree(Scaled(*(part.cpu() for part in found)), expected, torch.arange(6) < 4)
    assert torch.allclose(changed.cpu()[:4], on_cpu[:4], rtol=1e-5, atol=1e-5)


def agree(found: Scaled, expected: Scaled, finite: torch.Tensor) -> None:
    """Assert that rows differ only where the last bit of a float32 decides, and that others are NaN."""
    assert torch.equal(found.scales.isfinite()[:, 0], finite)
    assert found.values.float()[~finite].isnan().all()
    assert torch.allclose(found.scales[finite], expected.scales[finite], rtol=1e-5, atol=0)
    off = (found.values.float() - expected.values.float())[finite]
    assert (off.abs() <= 2**-3 * expected.values.float()[finite].abs() + 2**-9).all()
    assert (off != 0).float().mean() < 0.02  # on 8.9, ties after a cut to float16


@pytest.mark.parametrize("elementwise", [EAGER, TRITON])
@pytest.mark.parametrize("architecture", [SMALL_ESM2, SMALL])
def test_the_forward_is_as_exact_as_its_emulation(architecture: Architecture, elementwise: str) -> None:
    weights = untrained_tensors(architecture)
    expected, emulated = means(architecture, weights, torch.float32), means(architecture, weights, FLOAT8)
    cpu_pack = pack_of(architecture, LENGTHS)
    pack = Pack(cpu_pack.tokens.int().cuda(), cpu_pack.cu_seqlens.cuda(), cpu_pack.lengths)
    family, pool, kernels = (ESM2, mean_over_residues, attention)
    if architecture is SMALL:
        family, pool, kernels = (DnabertS, mean_over_tokens, alibi)
    kernel = kernels.choose_kernel(torch.device("cuda"), torch.bfloat16, architecture.head_dim)
    model = family(architecture, weights, FLOAT8, max(LENGTHS) + 2, kernel, elementwise).cuda()
    errors = [(means - expected).norm() / expected.norm() for means in (pool(model(pack), pack).cpu(), emulated)]
    print(architecture, elementwise, errors)
    assert errors[0] < 1.25 * errors[1]


@pytest.mark.parametrize("family", [PROTEINS, WINDOWS], ids=str)
def test_a_worker_in_float8_passes_its_audit(family: Family, tmp_path: Path) -> None:
    run = Run(tmp_path, 1).build(family.write_odd(tmp_path), family.model, family.policy)
    run.embed("float8", device="cuda", audit_seconds=600)
    status = json.loads(run.statuses[0].read_text())
    print(status["audit"])
    assert status["run"]["precision"] == "float8"
    assert status["audit"]["verdict"] == "ok" if family is PROTEINS else status["audit"]["worst_relative_error"] < 0.3


def test_a_linear_layer_moves_to_the_gpu_with_its_scales() -> None:
    architecture = MODELS["esm2_t6_8M_UR50D"]
    layer = make_linear(untrained_tensors(architecture), "layers.0.fc1.", FLOAT8, TRITON, activation="gelu").cuda()
    rows = layer(normal(33, architecture.hidden_dim).bfloat16().cuda())
    assert rows.values.is_cuda
    assert rows.values.shape == (33, architecture.ffn_dim)


def test_the_peak_of_products_is_measured() -> None:
    assert gemm_peak(torch.device("cuda"), FLOAT8) > 1e12
