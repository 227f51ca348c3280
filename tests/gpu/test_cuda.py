"""Compare kernels, forward passes, and the runner on CUDA with the CPU. Skipped without a CUDA device."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline import DEMO, MODEL, Run
from seqmill import open_embeddings
from seqmill.embedding.embedder import PackEmbedder
from seqmill.embedding.monitor import gemm_peak, gpu_use, monitor
from seqmill.embedding.pooling import mean_over_residues, mean_over_tokens
from seqmill.embedding.readout import Readout
from seqmill.embedding.runner import embed_packs
from seqmill.embedding.worker import embed_shard
from seqmill.model import alibi, dnabert_s
from seqmill.model.attention import FASTEST_FIRST, attend, choose_kernel, rotate, why_not
from seqmill.model.dnabert_s import DnabertS
from seqmill.model.elementwise import EAGER, TRITON
from seqmill.model.esm2 import ESM2, LAYER_NORM_EPS, rope_tables
from seqmill.model.kernels import compiled, fused
from seqmill.model.pack import Pack
from seqmill.model.weights import untrained_tensors
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import DNABERT_MODELS, MODELS, Architecture
from seqmill.spec.outputs import Outputs
from seqmill.spec.task import ComputeSettings, ShardTask
from seqmill.store.index import open_index
from sequences import random_sequences, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

LENGTHS = [1024, 700, 350, 350, 129, 64, 33, 16, 7, 3]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
COSINES = {torch.float32: 0.9999999, torch.bfloat16: 0.9999, torch.float16: 0.999999}
KERNELS = [name for name in FASTEST_FIRST if name not in compiled.KERNELS]
ALIBI_KERNELS = [name for name in alibi.FASTEST_FIRST if name not in compiled.KERNELS]
# For the whole forward pass of DNABERT-S. Its seeded weights amplify rounding; the CPU's errors are half as large.
DNABERT_ERRORS = {torch.float32: 5e-5, torch.bfloat16: 7e-2, torch.float16: 8e-3}
# The relative error of one rounding: half a step of the dtype, and float32's own error.
HALF_STEPS = {torch.float32: 2**-22, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def cuda() -> torch.device:
    return torch.device("cuda")


def on(device: torch.device, pack: Pack) -> Pack:
    return Pack(pack.tokens.to(device), pack.cu_seqlens.to(device), pack.lengths)


def make_pack(lengths: list[int]) -> Pack:
    tokens = np.random.default_rng(5).integers(4, 24, sum(lengths)).astype(np.uint8)
    return Pack.from_tokens(tokens, np.array(lengths, np.int64))


def skip_unless_usable(kernel: str, dtype: torch.dtype, head_dim: int) -> None:
    if reason := why_not(kernel, cuda(), dtype, head_dim):
        pytest.skip(f"{kernel}: {reason}")


def embedder(model: ESM2) -> PackEmbedder:
    return PackEmbedder(model, Readout("esm2", Outputs((len(model.layers),))), lambda: model)


def make_model(architecture: Architecture, dtype: torch.dtype, elementwise: str, max_tokens: int = 1024) -> ESM2:
    kernel = choose_kernel(cuda(), dtype, architecture.head_dim)
    return ESM2(architecture, untrained_tensors(architecture), dtype, max_tokens, kernel, elementwise).cuda()


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


def skip_unless_usable_with_biases(kernel: str, dtype: torch.dtype, head_dim: int) -> None:
    if reason := alibi.why_not(kernel, cuda(), dtype, head_dim):
        pytest.skip(f"{kernel}: {reason}")


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


@pytest.mark.parametrize("dtype", list(HALF_STEPS))
def test_fused_post_norm_and_gate_agree_with_float64_and_round_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    x, weight, bias = (torch.randn(*shape, generator=generator).cuda() for shape in ((1000, 768), (768,), (768,)))
    delta = torch.randn(1000, 768, generator=generator).to(dtype).cuda()
    added = x + delta
    row = x[500:501].clone()
    y = fused.add_norm(x, delta, weight, bias, dnabert_s.LAYER_NORM_EPS, dtype, post=True)
    exact = F.layer_norm(added.double(), (768,), weight.double(), bias.double(), dnabert_s.LAYER_NORM_EPS)
    assert ((x - exact).abs() <= exact.abs() * HALF_STEPS[torch.float32] + 4e-6).all()
    assert ((y.double() - exact).abs() <= exact.abs() * HALF_STEPS[dtype] + 4e-6).all()
    alone = fused.add_norm(row, delta[500:501], weight, bias, dnabert_s.LAYER_NORM_EPS, dtype, post=True)
    assert torch.equal(alone, y[500:501])
    h = (torch.randn(1000, 6144, generator=generator) * 3).to(dtype).cuda()
    first, second = h.double().chunk(2, dim=-1)
    exact = F.gelu(first) * second
    assert ((fused.gate(h).double() - exact).abs() <= exact.abs() * HALF_STEPS[dtype] + 4e-6).all()


def test_triton_kernels_are_available() -> None:
    assert fused.available(cuda())


@pytest.mark.parametrize("dtype", list(HALF_STEPS))
@pytest.mark.parametrize("dim", [320, 480, 640, 1280, 2560, 5120])
def test_fused_norm_agrees_with_float64_and_rounds_once(dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    x, weight, bias = (torch.randn(*shape, generator=generator).cuda() for shape in ((1000, dim), (dim,), (dim,)))
    delta = torch.randn(1000, dim, generator=generator).to(dtype).cuda()
    before, added = x.clone(), x + delta
    y = fused.add_norm(x, delta, weight, bias, LAYER_NORM_EPS, dtype)
    assert torch.equal(x, added)
    exact = F.layer_norm(added.double(), (dim,), weight.double(), bias.double(), LAYER_NORM_EPS)
    assert ((y.double() - exact).abs() <= exact.abs() * HALF_STEPS[dtype] + 4e-6).all()
    row = before[500:501].clone()
    assert torch.equal(fused.add_norm(row, delta[500:501], weight, bias, LAYER_NORM_EPS, dtype), y[500:501])


@pytest.mark.parametrize("dtype", list(HALF_STEPS))
@pytest.mark.parametrize(("num_heads", "head_dim"), [(20, 16), (20, 24), (20, 32), (20, 64), (40, 64), (40, 128)])
def test_fused_rotation_agrees_with_float64_and_rounds_once(num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    pack = on(cuda(), make_pack(LENGTHS))
    qkv = torch.randn(sum(LENGTHS), 3, num_heads, head_dim, generator=torch.Generator().manual_seed(7)).to(dtype).cuda()
    before = qkv.clone()
    cos, sin = (table.cuda() for table in rope_tables(1024, head_dim, torch.float32))
    fused.rotate(qkv, cos, sin, pack.positions)
    exact = rotate(before[:, :2].double(), cos.double()[pack.positions], sin.double()[pack.positions])
    assert ((qkv[:, :2].double() - exact).abs() <= exact.abs() * HALF_STEPS[dtype] + 1e-6).all()
    assert torch.equal(qkv[:, 2], before[:, 2])


def test_rotation_and_pooling_agree_with_the_cpu() -> None:
    pack = make_pack(LENGTHS)
    hidden = torch.randn(sum(LENGTHS), 320, generator=torch.Generator().manual_seed(2))
    found = mean_over_residues(hidden.cuda(), on(cuda(), pack)).cpu().numpy()
    assert relative_error(found, mean_over_residues(hidden, pack).numpy()) < 1e-6
    qk = torch.randn(sum(LENGTHS), 2, 4, 16, generator=torch.Generator().manual_seed(3))
    cos, sin = (table[pack.positions] for table in rope_tables(1024, 16, torch.float32))
    found = rotate(qk.cuda(), cos.cuda(), sin.cuda()).cpu().numpy()
    assert relative_error(found, rotate(qk, cos, sin).numpy()) < 1e-6


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


def test_the_asynchronous_runner_matches_one_pack_at_a_time(tmp_path: Path) -> None:
    fasta = tmp_path / "many.faa"
    lengths = np.random.default_rng(1).integers(1, 1022, 600).tolist()
    fasta.write_text("".join(f">{number}\n{s}\n" for number, s in enumerate(random_sequences(lengths))))
    index = open_index(Run(tmp_path, 1).build(fasta).index)
    model = make_model(MODELS["esm2_t6_8M_UR50D"], torch.bfloat16, True, index.max_tokens)
    found = list(embed_packs(embedder(model), index, range(index.num_packs), cuda(), threads=1))
    assert [number for number, *_ in found] == list(range(index.num_packs))
    assert len(found) > 20
    for number, embeddings, _ in found:
        pack = on(cuda(), Pack.from_tokens(index.pack_tokens(number), index.pack_lengths(number)))
        assert (mean_over_residues(model(pack), pack).float().cpu().numpy() == embeddings).all()


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


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_shards_give_the_same_bits_and_match_the_cpu(tmp_path: Path, precision: str) -> None:
    results = []
    for world_size in (1, 3):
        run = Run(tmp_path / str(world_size), world_size).build(DEMO, MODEL)
        for rank, (shard, status) in enumerate(zip(run.shards, run.statuses, strict=True)):
            embed_shard(ShardTask(run.index, rank, world_size, shard, status, ComputeSettings("cuda", precision)))
        results.append(open_embeddings(run.merge().embeddings)[:])
    assert (results[0] == results[1]).all()
    expected = open_embeddings(Run(tmp_path / "cpu", 1).build(DEMO, MODEL).embed("float32").merge().embeddings)[:]
    assert relative_error(results[0], expected) < (1e-5 if precision == "float32" else 1e-2)


@pytest.mark.parametrize("policy", [LengthPolicy(), LengthPolicy("window", 300, 300, 150)], ids=["whole", "windows"])
def test_residues_and_windows_match_the_cpu(tmp_path: Path, policy: LengthPolicy) -> None:
    outputs = Outputs((-1, 3), ("mean", "std"), "float32")
    files = []
    for device in ("cuda", "cpu"):
        run = Run(tmp_path / device, 2).build(DEMO, MODEL, policy)
        for rank in range(2):
            embed_shard(run.task(rank, outputs=outputs, device=device))
        files.append(open_embeddings(run.merge().embeddings))
    for layer in (-1, 3):
        for pooling in ("mean", "std"):
            found, expected = (open_embeddings(file.path, layer, pooling) for file in files)
            assert relative_error(found[:], expected[:]) < 1e-5
        for record in range(len(found)):
            assert relative_error(found.residues(record), expected.residues(record)) < 1e-4
