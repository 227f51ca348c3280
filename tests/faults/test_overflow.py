"""Half precision that overflows: only the affected sequences are computed in float32."""

from pathlib import Path

import numpy as np
import pytest
import torch
from workers import embed, status_of

from pipeline import Run
from reference import ALPHABET, fair_esm_model, save_checkpoint
from seqmill.embedding.embedder import PackEmbedder
from seqmill.embedding.readout import Readout
from seqmill.embedding.runner import embed_packs
from seqmill.model.esm2 import ESM2
from seqmill.model.weights import load_weights
from seqmill.spec.models import MODELS, find_model
from seqmill.spec.outputs import Outputs
from seqmill.store.index import Index, open_index
from seqmill.store.shards import open_shard
from sequences import random_sequences, relative_error

LETTER, CHANNEL, UNIT = "W", 5, 7


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with which one hidden unit of the first block reaches about 80,000 at one letter, without any effect.

    Only that letter has a large value in one channel of its embedding; attention adds nothing to the channel, so
    the value reaches the first fc1. fc2 ignores the unit, so nothing changes in float32.
    """
    model = fair_esm_model(MODELS["esm2_t6_8M_UR50D"])
    first = model.layers[0]
    with torch.no_grad():
        model.embed_tokens.weight[:, CHANNEL] = 0
        model.embed_tokens.weight[ALPHABET.get_idx(LETTER), CHANNEL] = 50
        first.self_attn.out_proj.weight[CHANNEL] = first.self_attn.out_proj.bias[CHANNEL] = 0
        first.final_layer_norm.weight[CHANNEL], first.final_layer_norm.bias[CHANNEL] = 1, 0
        first.fc1.weight[UNIT] = 0
        first.fc1.weight[UNIT, CHANNEL] = 5000
        first.fc2.weight[:, UNIT] = 0
    return save_checkpoint(model, tmp_path_factory.mktemp("weights") / "overflow.pt")


def embed_alone(checkpoint: Path, index: Index, precision: torch.dtype, packs: range) -> np.ndarray:
    """Return the embeddings of all sequences in the order of the index, computed in one precision."""
    weights = load_weights(find_model(str(checkpoint)))
    model = ESM2(weights.architecture, weights.tensors, precision, index.max_tokens, "sdpa")
    embedder = PackEmbedder(model, Readout(model.architecture.family, Outputs((len(model.layers),))), lambda: model)
    return np.concatenate([rows for _, rows, _ in embed_packs(embedder, index, packs, torch.device("cpu"), 1)])


def test_an_overflow_in_float16(checkpoint: Path, tmp_path: Path) -> None:
    """Sequences with the letter get float32 embeddings (to 1e-6), others float16 (bit for bit); the status counts."""
    sequences = [s.replace(LETTER, "A") for s in random_sequences([90, 200, 60, 400, 120, 300, 250, 40])]
    for number, place in ((1, 0), (4, 60), (5, 299)):
        sequences[number] = sequences[number][:place] + LETTER + sequences[number][place + 1 :]
    fasta = tmp_path / "some.faa"
    fasta.write_text("".join(f">id{n}\n{s}\n" for n, s in enumerate(sequences)))
    run = Run(tmp_path, 1).build(fasta, str(checkpoint))
    index = open_index(run.index)
    packs = range(index.num_packs)
    half = embed_alone(checkpoint, index, torch.float16, packs)
    single = embed_alone(checkpoint, index, torch.float32, packs)
    with_letter = np.array([LETTER in sequences[int(record)] for record in index.sequence_records])
    assert np.isfinite(single).all()
    assert np.array_equal(~np.isfinite(half).all(axis=1), with_letter)  # it does overflow, and only there
    assert not np.array_equal(half[~with_letter], single[~with_letter])

    done = embed(run, 0, "--precision", "float16")
    assert done.returncode == 0, done.stderr
    status = status_of(run)
    assert status["status"] == "complete"
    assert status["run"]["precision"] == "float16"
    assert status["run"]["recomputed_float32"] == with_letter.sum() == 3
    assert status["quarantined"] == {}
    assert "an embedding is not finite: computing it alone in float32" in done.stderr
    assert "'id4' (record 5): finite in float32" in done.stderr
    shard = open_shard(run.shards[0])
    assert np.array_equal(shard.index_rows, np.arange(index.num_sequences))
    assert np.array_equal(shard.embeddings[~with_letter], half[~with_letter])
    for found, expected in zip(shard.embeddings[with_letter], single[with_letter], strict=True):
        assert relative_error(found, expected) < 1e-6
    run.merge()
