"""Forward passes on CUDA compared with the CPU; the monitor. Skipped without a CUDA device."""

import dataclasses

import numpy as np
import pytest
import torch
from on_cuda import (
    ALIBI_KERNELS,
    LENGTHS,
    cuda,
    make_model,
    make_pack,
    needs_cuda,
    on,
    skip_unless_usable_with_biases,
)

from seqmill.embedding.monitor import gemm_peak, gpu_use, monitor
from seqmill.embedding.pooling import mean_over_residues, mean_over_tokens
from seqmill.model.dnabert_s import DnabertS
from seqmill.model.elementwise import EAGER, TRITON
from seqmill.model.esm2 import ESM2
from seqmill.model.families import IMPLEMENTATIONS
from seqmill.model.weights import untrained_tensors
from seqmill.spec.models import DNABERT_MODELS, MODELS
from sequences import relative_error

pytestmark = needs_cuda

COSINES = {torch.float32: 0.9999999, torch.bfloat16: 0.9999, torch.float16: 0.999999}
# For the whole forward pass of DNABERT-S. Its seeded weights amplify rounding; the CPU's errors are half as large.
DNABERT_ERRORS = {torch.float32: 5e-5, torch.bfloat16: 7e-2, torch.float16: 8e-3}

# For two layers of ESM C and T5: at least twice the CPU's errors.
ERRORS = {torch.float32: 5e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("name", ["esm2_t6_8M_UR50D", "esm2_t12_35M_UR50D", "esm2_t30_150M_UR50D"])
@pytest.mark.parametrize("dtype", list(COSINES))
@pytest.mark.parametrize("elementwise", [EAGER, TRITON])
def test_the_forward_agrees_with_float32_on_the_cpu(name: str, dtype: torch.dtype, elementwise: str) -> None:
    pack = make_pack(LENGTHS)
    exact = ESM2(MODELS[name], untrained_tensors(MODELS[name]), torch.float32, 1024)
    expected = mean_over_residues(exact(pack), pack).numpy().astype(np.float64)
    gpu_pack = on(cuda(), pack)
    hidden = make_model(MODELS[name], dtype, elementwise)(gpu_pack)
    found = mean_over_residues(hidden, gpu_pack).cpu().numpy().astype(np.float64)
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > COSINES[dtype]


@pytest.mark.parametrize("dtype", list(DNABERT_ERRORS))
@pytest.mark.parametrize("elementwise", [EAGER, TRITON])
@pytest.mark.parametrize("kernel", ALIBI_KERNELS)
def test_the_forward_of_dnabert_s_agrees_with_float64_on_the_cpu(
    kernel: str, elementwise: str, dtype: torch.dtype
) -> None:
    architecture = DNABERT_MODELS["dnabert_s"]
    skip_unless_usable_with_biases(kernel, dtype, architecture.head_dim)
    lengths = [700, 350, 129, 64, 33, 16, 7, 3]
    pack, tensors = make_pack(lengths), untrained_tensors(architecture)
    expected = mean_over_tokens(DnabertS(architecture, tensors, torch.float64, 700)(pack), pack).numpy()
    gpu_pack = on(cuda(), pack)
    model = DnabertS(architecture, tensors, dtype, 700, kernel, elementwise).cuda()
    found = mean_over_tokens(model(gpu_pack), gpu_pack).double().cpu().numpy()
    assert relative_error(found, expected) < DNABERT_ERRORS[dtype]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("esmc_300m", dtype) for dtype in ERRORS),
        *(("prott5_xl_u50", dtype) for dtype in (torch.float32, torch.bfloat16)),
    ],
)
@pytest.mark.parametrize("elementwise", [EAGER, TRITON])
@pytest.mark.parametrize("is_fastest", [True, False], ids=["fastest", "sdpa"])
def test_the_forward_of_esmc_and_t5_agrees_with_float64_on_the_cpu(
    is_fastest: bool, elementwise: str, name: str, dtype: torch.dtype
) -> None:
    architecture = dataclasses.replace(MODELS[name], num_layers=2)
    family = IMPLEMENTATIONS[architecture.family]
    kernel = family.attention.choose_kernel(cuda(), dtype, architecture.head_dim) if is_fastest else "sdpa"
    lengths = [700, 350, 350, 129, 64, 33, 16, 7, 3]
    pack, tensors = make_pack(lengths), untrained_tensors(architecture)
    expected = family.encoder(architecture, tensors, torch.float64, 700)(pack).numpy()
    model = family.encoder(architecture, tensors, dtype, 700, kernel, elementwise).cuda()
    found = model(on(cuda(), pack)).double().cpu().numpy()
    assert relative_error(found, expected) < ERRORS[dtype]


def test_the_monitor_and_the_peak_give_numbers() -> None:
    peak = gemm_peak(cuda(), torch.bfloat16)
    assert 1e11 < peak < 1e17
    with monitor(cuda(), seconds=0.01) as found:
        for _ in range(20):
            gemm_peak(cuda(), torch.bfloat16)
    summary = gpu_use(found)
    if not summary:
        pytest.skip("NVML does not answer for this device")
    assert 0 < summary["gpu_utilization_mean"] <= 100
    assert 0 < summary["gpu_memory_bytes_max"] <= torch.cuda.get_device_properties(cuda()).total_memory * 1.1
    assert summary["gpu_power_watts_mean"] > 0
