"""Shards from CUDA, from a FASTA to merged embeddings, compared with the CPU. Skipped without a CUDA device."""

from pathlib import Path

import numpy as np
import pytest
from on_cuda import needs_cuda

from pipeline import CONTIGS_DEMO, DEMO, MODEL, Run
from seqmill import open_embeddings
from seqmill.embedding.worker import embed_shard
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.outputs import Outputs
from seqmill.spec.task import ComputeSettings, ShardTask
from sequences import random_sequences, relative_error

pytestmark = needs_cuda

# As for the forward alone (test_cuda_forward.py): its seeded weights amplify rounding.
DNABERT_ERRORS = {"float32": 1e-4, "bfloat16": 7e-2, "float16": 8e-3}


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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["esmc_300m", "prott5_xl_u50", "prostt5"])
def test_shards_of_esmc_and_t5_give_the_same_bits_and_match_the_cpu(name: str, precision: str, tmp_path: Path) -> None:
    fasta, model = tmp_path / "proteins.faa", f"untrained:{name}"
    sequences = random_sequences([3, 7, 16, 33, 64, 129, 90, 40, 12, 200])
    fasta.write_text("".join(f">{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
    results = []
    for world_size in (1, 3):
        run = Run(tmp_path / str(world_size), world_size).build(fasta, model)
        for rank in range(world_size):
            embed_shard(run.task(rank, device="cuda", precision=precision))
        results.append(open_embeddings(run.merge().embeddings)[:])
    assert np.array_equal(*results)
    on_cpu = Run(tmp_path / "cpu", 1).build(fasta, model).embed("float32").merge()
    assert relative_error(results[0], open_embeddings(on_cpu.embeddings)[:]) < DNABERT_ERRORS[precision]


@pytest.mark.parametrize("precision", list(DNABERT_ERRORS))
def test_contigs_give_the_same_bits_and_match_the_cpu(tmp_path: Path, precision: str) -> None:
    """DNABERT-S, with windows on both strands."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    policy, model = LengthPolicy("window", 1500, 1000, 700, "both"), "untrained:dnabert_s"
    results = []
    for world_size in (1, 3):
        run = Run(tmp_path / str(world_size), world_size).build(CONTIGS_DEMO, model, policy)
        for rank in range(world_size):
            embed_shard(run.task(rank, device="cuda", precision=precision))
        results.append(open_embeddings(run.merge().embeddings)[:])
    assert np.array_equal(*results)
    on_cpu = Run(tmp_path / "cpu", 1).build(CONTIGS_DEMO, model, policy).embed("float32").merge()
    assert relative_error(results[0], open_embeddings(on_cpu.embeddings)[:]) < DNABERT_ERRORS[precision]


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
