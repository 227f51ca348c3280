"""Several layers and poolings in one pass, against fair-esm and a written-out DNABERT-S, pooled by hand."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from dnabert_reference import SMALL, reference_hidden, save_folder, seeded_state
from outputs_by_hand import embed, pooled_by_hand
from pipeline import Run, run_script
from reference import ALPHABET, fair_esm_model, save_checkpoint
from seqmill import open_embeddings
from seqmill.errors import SeqmillError
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import MODELS
from seqmill.spec.outputs import POOLINGS, Outputs
from seqmill.store.index import open_index
from seqmill.store.status import read_status
from sequences import random_sequences, relative_error

LAYERS = (6, 0, -3)
LENGTHS = [40, 7, 1, 7, 130, 2]


@pytest.fixture(scope="module")
def proteins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str], torch.nn.Module]:
    """A FASTA, a checkpoint, the sequences, and fair-esm's model."""
    folder = tmp_path_factory.mktemp("proteins")
    sequences = random_sequences(LENGTHS)
    (folder / "p.faa").write_text("".join(f">p{n}\n{s}\n" for n, s in enumerate(sequences)))
    model = fair_esm_model(MODELS["esm2_t6_8M_UR50D"])
    return folder / "p.faa", save_checkpoint(model, folder / "8M.pt"), sequences, model


def test_layers_and_poolings_of_proteins(proteins: tuple, tmp_path: Path) -> None:
    fasta, checkpoint, sequences, model = proteins
    outputs = Outputs(LAYERS, POOLINGS)
    run = embed(Run(tmp_path, 1).build(fasta, str(checkpoint)), outputs, audit_seconds=3600)
    layers = [layer % 7 for layer in LAYERS]
    expected: dict[tuple[int, str], list[np.ndarray]] = {}
    for sequence in sequences:
        tokens = torch.tensor([[0, *(ALPHABET.get_idx(letter) for letter in sequence), 2]])
        with torch.no_grad():
            hidden = model.double()(tokens, repr_layers=layers)["representations"]
        for layer in layers:
            for pooling in POOLINGS:
                vector = pooled_by_hand(hidden[layer][0].numpy(), pooling, special_too=False)
                expected.setdefault((layer, pooling), []).append(vector)
    everything = open_embeddings(run.embeddings)
    assert everything.outputs == [(layer, pooling) for layer in layers for pooling in POOLINGS]
    assert (everything.layer, everything.pooling) == (6, "mean")
    for (layer, pooling), vectors in expected.items():
        found = open_embeddings(run.embeddings, layer, pooling)
        assert (found.layer, found.pooling) == (layer, pooling)
        for row, vector in enumerate(vectors):
            if pooling == "std" and len(sequences[row]) == 1:
                assert not found[row].any()
            else:
                assert relative_error(found[row], vector) < 5e-5, (layer, pooling, row)
    audits = [read_status(status).audit for status in run.statuses]
    assert [audit.verdict for audit in audits] == ["ok"]
    assert max(audit.worst_relative_error for audit in audits) < 5e-5


def test_the_first_output_has_the_same_bits_alone(proteins: tuple, tmp_path: Path) -> None:
    fasta, checkpoint = proteins[:2]
    (tmp_path / "many").mkdir()
    many = embed(Run(tmp_path / "many", 3).build(fasta, str(checkpoint)), Outputs((-1, 2), ("mean", "std")))
    (tmp_path / "one").mkdir()
    one = embed(Run(tmp_path / "one", 1).build(fasta, str(checkpoint)), Outputs())
    assert (open_embeddings(many.embeddings)[:] == open_embeddings(one.embeddings)[:]).all()
    with h5py.File(many.embeddings) as file:
        assert set(file) == {
            *("embeddings", "embeddings_6_std", "embeddings_2_mean", "embeddings_2_std"),
            *("lengths", "sequence_digests", "sequence_ids"),
        }


def test_poolings_of_windows_and_strands(tmp_path: Path) -> None:
    """Pools each window separately: means are weighted by bases, max is the maximum, std is that of all windows."""
    state = seeded_state(SMALL)
    folder = save_folder(state, SMALL, tmp_path / "model")
    generator = np.random.default_rng(5)
    contigs = ["".join(generator.choice(list("ACGT"), length)) for length in (700, 90, 230, 5)]
    (tmp_path / "c.fna").write_text("".join(f">c{n}\n{contig}\n" for n, contig in enumerate(contigs)))
    outputs = Outputs((-1, 1), POOLINGS)
    policy = LengthPolicy("window", 200, 200, 150, "both")
    run = embed(Run(tmp_path, 1).build(tmp_path / "c.fna", str(folder), policy), outputs, audit_seconds=3600)
    index = open_index(run.index)
    assert index.has_segments
    for number, num_layers in ((3, 3), (1, 1)):
        shorter = replace(SMALL, num_layers=num_layers)
        for record in range(len(contigs)):
            row = int(index.record_rows[record])
            weights = index.row_weights(row).astype(float)
            segments = [np.array(tokens) for tokens in index.row_segments(row)]
            hidden = [h.numpy() for h in reference_hidden(state, shorter, segments, torch.float64)]
            for pooling in POOLINGS:
                if pooling == "max":
                    expected = np.concatenate([states[1:-1] for states in hidden]).max(axis=0)
                elif pooling == "std":
                    # A token's weight is the number of its window's bases divided by the number of the window's tokens.
                    tokens = np.concatenate([states[1:-1] for states in hidden])
                    shares = np.concatenate(
                        [
                            np.full(len(states) - 2, w / (len(states) - 2))
                            for w, states in zip(weights, hidden, strict=True)
                        ]
                    )
                    mean = np.average(tokens, axis=0, weights=shares)
                    expected = np.sqrt(np.average((tokens - mean) ** 2, axis=0, weights=shares))
                else:
                    vectors = [pooled_by_hand(states, pooling, special_too=True) for states in hidden]
                    expected = np.average(vectors, axis=0, weights=weights)
                found = open_embeddings(run.embeddings, number, pooling)[record]
                assert relative_error(found, expected) < 5e-5, (number, pooling, record)
    assert [read_status(status).audit.verdict for status in run.statuses] == ["ok"]


def test_float16_in_the_results(proteins: tuple, tmp_path: Path) -> None:
    fasta, checkpoint = proteins[:2]
    run = embed(Run(tmp_path, 1).build(fasta, str(checkpoint)), Outputs((-1,), ("mean", "max")), "float16")
    half = open_embeddings(run.embeddings)[:]
    assert half.dtype == np.float16
    embed(run, Outputs((-1,), ("mean", "max")))
    assert (open_embeddings(run.embeddings)[:].astype(np.float16) == half).all()


def test_outputs_that_the_model_lacks_are_refused(proteins: tuple, tmp_path: Path) -> None:
    fasta, checkpoint = proteins[:2]
    run = Run(tmp_path, 1).build(fasta, str(checkpoint))
    arguments = ["--index", run.index, "--rank", 0, "--world-size", 1, "--device", "cpu"]
    arguments += ["--output", run.shards[0], "--status", run.statuses[0]]

    def refused(*options: object) -> str:
        done: subprocess.CompletedProcess[str] = run_script("embed_shard.py", *arguments, *options)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]

    assert "layer 7: the model has layers 0 to 6, or -7 to -1" in refused("--layers", 7)
    assert "layers must be one or more, each once, not 6, 6" in refused("--layers", 6, -1)
    with pytest.raises(SeqmillError, match="poolings must be one or more"):
        Outputs((-1,), ())
    with pytest.raises(SeqmillError, match="pooling must be of mean, mean_tokens, max, std, cls, not sum"):
        Outputs((-1,), ("mean", "sum"))
    embed(run, Outputs((-1, 3)))
    with pytest.raises(SeqmillError, match="no such output; there is layer 6 pooled by mean, layer 3 pooled by mean"):
        open_embeddings(run.embeddings, layer=5)
    assert json.loads(open_embeddings(run.embeddings).attrs["outputs"])[1] == {
        **{"dataset": "embeddings_3_mean", "layer": 3, "pooling": "mean"}
    }
