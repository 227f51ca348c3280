"""On a CUDA device: kernels, forward and runner against float32 on the CPU. Skipped without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import DEMO, MODEL, Run
from seqpack import open_embeddings
from seqpack.attention import attend, has_varlen, rotate
from seqpack.index import open_index
from seqpack.models.esm2 import ESM2, rope_tables
from seqpack.models.registry import MODELS
from seqpack.models.weights import untrained_tensors
from seqpack.packs import Pack
from seqpack.pooling import mean_over_residues
from seqpack.runner import embed_packs
from seqpack.worker import ShardTask, embed_shard
from sequences import random_sequences, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

LENGTHS = [1024, 700, 350, 350, 129, 64, 33, 16, 7, 3]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def cuda() -> torch.device:
    return torch.device("cuda")


def on(device: torch.device, pack: Pack) -> Pack:
    return Pack(pack.tokens.to(device), pack.cu_seqlens.to(device), pack.lengths)


def make_pack(lengths: list[int]) -> Pack:
    tokens = np.random.default_rng(5).integers(4, 24, sum(lengths)).astype(np.uint8)
    return Pack.from_tokens(tokens, np.array(lengths, np.int64))


@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
def test_every_kernel_agrees_with_float32_on_the_cpu(kernel: str, dtype: torch.dtype, head_dim: int) -> None:
    if kernel == "varlen" and (dtype == torch.float32 or not has_varlen(cuda())):
        pytest.skip("varlen needs 16 bits and compute capability 8.0")
    pack = make_pack(LENGTHS)
    qkv = torch.randn(sum(LENGTHS), 3, 4, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    cos, sin = rope_tables(1024, head_dim, torch.float32)
    expected = attend("sdpa", qkv.float(), cos, sin, pack).numpy()
    found = attend(kernel, qkv.cuda(), cos.cuda(), sin.cuda(), on(cuda(), pack)).float().cpu().numpy()
    assert relative_error(found, expected) < TOLERANCES[dtype]


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_agrees_with_float32_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    pack, tensors = make_pack(LENGTHS), untrained_tensors(MODELS[name])
    expected = mean_over_residues(ESM2(MODELS[name], tensors, torch.float32, 1024)(pack), pack).numpy()
    kernel = "varlen" if dtype != torch.float32 and has_varlen(cuda()) else "sdpa"
    model = ESM2(MODELS[name], tensors, dtype, 1024, kernel).cuda()
    gpu_pack = on(cuda(), pack)
    found = mean_over_residues(model(gpu_pack), gpu_pack).cpu().numpy()
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > (0.9999 if dtype != torch.float32 else 0.9999999)


def test_the_asynchronous_runner_gives_what_one_pack_at_a_time_gives(tmp_path: Path) -> None:
    fasta = tmp_path / "many.faa"
    lengths = np.random.default_rng(1).integers(1, 1022, 600).tolist()
    fasta.write_text("".join(f">{number}\n{s}\n" for number, s in enumerate(random_sequences(lengths))))
    index = open_index(Run(tmp_path, 1).build(fasta).index)
    architecture = MODELS["esm2_t6_8M_UR50D"]
    kernel = "varlen" if has_varlen(cuda()) else "sdpa"
    model = ESM2(architecture, untrained_tensors(architecture), torch.bfloat16, index.max_tokens, kernel).cuda()
    found = list(embed_packs(model, index, range(index.num_packs), cuda(), threads=1))
    assert len(found) == index.num_packs > 20
    for number in range(index.num_packs):
        pack = on(cuda(), Pack.from_tokens(index.pack_tokens(number), index.pack_lengths(number)))
        assert (mean_over_residues(model(pack), pack).float().cpu().numpy() == found[number]).all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_shards_give_the_same_bits_and_the_cpus_values(tmp_path: Path, precision: str) -> None:
    results = []
    for world_size in (1, 3):
        run = Run(tmp_path / str(world_size), world_size).build(DEMO, MODEL)
        for rank, (shard, status) in enumerate(zip(run.shards, run.statuses, strict=True)):
            embed_shard(ShardTask(run.index, rank, world_size, shard, status, device="cuda", precision=precision))
        results.append(open_embeddings(run.merge().embeddings)[:])
    assert (results[0] == results[1]).all()
    expected = open_embeddings(Run(tmp_path / "cpu", 1).build(DEMO, MODEL).embed("float32").merge().embeddings)[:]
    assert relative_error(results[0], expected) < (1e-5 if precision == "float32" else 1e-2)
