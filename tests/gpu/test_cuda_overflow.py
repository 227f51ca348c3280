"""float16 that overflows on CUDA: only the sequences concerned, which float32 mends. Skipped without a CUDA device."""

from pathlib import Path

import numpy as np
import pytest
import torch
from on_cuda import KERNELS, cuda, embedder, needs_cuda, on

from pipeline import Run
from seqmill.embedding.worker import embed_shard
from seqmill.model.attention import why_not
from seqmill.model.elementwise import EAGER, TRITON
from seqmill.model.esm2 import ESM2
from seqmill.model.esm2_weights import save_checkpoint
from seqmill.model.kernels import fused
from seqmill.model.pack import Pack
from seqmill.model.weights import untrained_tensors
from seqmill.spec.models import MODELS
from seqmill.store.index import open_index
from seqmill.store.shards import open_shard
from sequences import random_sequences, relative_error

pytestmark = needs_cuda

ARCHITECTURE = MODELS["esm2_t6_8M_UR50D"]
LETTER, TOKEN, OTHER = "W", 22, 5  # tryptophan's token, and alanine's
CHANNEL, UNIT = 5, 7


def tensors_that_overflow() -> dict[str, torch.Tensor]:
    """Return weights with which one hidden unit of the first block reaches about 80,000 at one letter, without effect.

    Only that letter has a large value in one channel of its embedding; attention adds nothing to the channel, so the
    value reaches the first fc1. fc2 ignores the unit, so nothing changes in float32.
    """
    tensors = untrained_tensors(ARCHITECTURE)
    tensors["embed.weight"][:, CHANNEL] = 0
    tensors["embed.weight"][TOKEN, CHANNEL] = 50
    tensors["layers.0.out.weight"][CHANNEL] = tensors["layers.0.out.bias"][CHANNEL] = 0
    tensors["layers.0.ffn_norm.weight"][CHANNEL], tensors["layers.0.ffn_norm.bias"][CHANNEL] = 1, 0
    tensors["layers.0.fc1.weight"][UNIT] = 0
    tensors["layers.0.fc1.weight"][UNIT, CHANNEL] = 5000
    tensors["layers.0.fc2.weight"][:, UNIT] = 0
    return tensors


@pytest.mark.parametrize("elementwise", [EAGER, TRITON])
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_overflow_stays_in_its_sequence(kernel: str, elementwise: str) -> None:
    if reason := why_not(kernel, cuda(), torch.float16, ARCHITECTURE.head_dim):
        pytest.skip(f"{kernel}: {reason}")
    if elementwise == TRITON and not fused.available(cuda()):
        pytest.skip("Triton's kernels are not available")
    lengths = np.array([400, 300, 250, 200, 129, 64, 33, 3], np.int64)
    begins = np.concatenate(([0], np.cumsum(lengths)))
    tokens = np.random.default_rng(5).integers(4, 22, lengths.sum()).astype(np.uint8)
    planted = tokens.copy()
    affected = [1, 4, 7]
    for sequence, place in zip(affected, (0, 64, 1), strict=True):
        planted[begins[sequence] + place] = TOKEN
    model = ESM2(ARCHITECTURE, tensors_that_overflow(), torch.float16, 400, kernel, elementwise).cuda()
    embed = embedder(model)
    found, expected = (
        embed(on(cuda(), Pack.from_tokens(values, lengths))).rows.cpu().numpy() for values in (planted, tokens)
    )
    others = [number for number in range(len(lengths)) if number not in affected]
    assert np.isnan(found[affected]).all()
    assert np.isfinite(expected).all()
    assert np.array_equal(found[others], expected[others])


def test_float32_mends_the_sequences_that_overflow(tmp_path: Path) -> None:
    parts = {
        name: list(tensor.chunk(3)) if ".qkv." in name else [tensor] for name, tensor in tensors_that_overflow().items()
    }
    save_checkpoint(ARCHITECTURE, parts, tmp_path / "overflow.pt")
    sequences = [s.replace(LETTER, "A") for s in random_sequences([90, 200, 60, 400, 120, 300, 250, 40])]
    for number, place in ((1, 0), (4, 60), (5, 299)):
        sequences[number] = sequences[number][:place] + LETTER + sequences[number][place + 1 :]
    fasta = tmp_path / "some.faa"
    fasta.write_text("".join(f">id{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
    run = Run(tmp_path, 1).build(fasta, str(tmp_path / "overflow.pt"))
    done = embed_shard(run.task(0, device="cuda", precision="float16"))
    assert done.run.recomputed_float32 == 3
    found = open_shard(run.shards[0]).embeddings[:]
    assert np.isfinite(found).all()
    index = open_index(run.index)
    with_letter = np.array([LETTER in sequences[int(record)] for record in index.sequence_records])
    on_cpu = Run(tmp_path / "cpu", 1).build(fasta, str(tmp_path / "overflow.pt")).embed("float32")
    expected = open_shard(on_cpu.shards[0]).embeddings[:]
    assert relative_error(found[with_letter], expected[with_letter]) < 1e-5
    assert relative_error(found[~with_letter], expected[~with_letter]) < 1e-2
