"""Windows of long proteins: blended per residue as written out with fair-esm, same bits for any world size."""

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from families import SMALL_ESM2
from outputs_by_hand import LENGTHS, POLICIES, blended_by_hand, embed, pooled_by_hand
from pipeline import Run
from reference import fair_esm_model, save_checkpoint
from seqmill import open_embeddings
from seqmill.embedding import embedder, runner
from seqmill.embedding.audit import StoredVectors, audit_embeddings
from seqmill.embedding.runner import whole_pack
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import find_model
from seqmill.spec.outputs import POOLINGS, Outputs
from seqmill.store.index import open_index
from seqmill.store.shards import open_shard
from sequences import random_sequences, relative_error


@pytest.fixture(scope="module")
def proteins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str], torch.nn.Module]:
    folder = tmp_path_factory.mktemp("proteins")
    sequences = random_sequences(LENGTHS)
    (folder / "p.faa").write_text("".join(f">p{n}\n{s}\n" for n, s in enumerate(sequences)))
    model = fair_esm_model(SMALL_ESM2)
    return folder / "p.faa", save_checkpoint(model, folder / "model.pt"), sequences, model.double()


@pytest.mark.parametrize("name", POLICIES)
def test_windows_are_blended_residue_by_residue(
    proteins: tuple, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fasta, checkpoint, sequences, model = proteins
    # Small pieces split the windows of one sequence, and the pack into groups of sequences.
    monkeypatch.setattr(embedder, "CPU_KEPT_TOKENS", 200)
    monkeypatch.setattr(runner, "CPU_PIECE_TOKENS", 300)
    outputs = Outputs((-1, 2), POOLINGS)
    run = embed(Run(tmp_path, 1).build(fasta, str(checkpoint), POLICIES[name]), outputs)
    index = open_index(run.index)
    assert index.is_blended
    by_hand = [blended_by_hand(sequence, POLICIES[name], model, (6, 2)) for sequence in sequences]
    for layer, pooling in ((layer, pooling) for layer in (6, 2) for pooling in POOLINGS):
        vectors = open_embeddings(run.embeddings, layer, pooling)
        for record, states in enumerate(by_hand):
            expected = pooled_by_hand(states[layer], pooling, special_too=False)
            if expected.any():
                assert relative_error(vectors[record], expected) < 5e-5, (layer, record, pooling)
            else:
                assert not vectors[record].any()
    stored = StoredVectors(index, outputs.of(6), open_shard(run.shards[0]).embeddings.__getitem__)
    audit = audit_embeddings(stored, find_model(str(checkpoint)), np.arange(index.num_sequences), 600)
    assert (audit.sequences, audit.longest_included) == (8, True)
    assert audit.worst_relative_error < 5e-5
    with gzip.open(tmp_path / "records.tsv.gz", "rt") as text:
        rows = list(csv.DictReader(text, delimiter="\t"))
    for row, length in zip(rows, LENGTHS, strict=True):
        policy = POLICIES[name]
        windows = 1 if length <= 60 else -(-(length - policy.window) // policy.stride) + 1
        assert (row["length"], row["embedded_length"], row["windows"]) == (str(length), str(length), str(windows))
        assert row["fate"] == ("windowed" if length > 60 else "embedded")


def test_sequences_that_fit_a_window_keep_their_bits_for_any_world_size(proteins: tuple, tmp_path: Path) -> None:
    fasta, checkpoint = proteins[:2]
    found = []
    for world_size, policy in ((1, POLICIES["half"]), (3, POLICIES["half"]), (1, LengthPolicy("truncate", 60))):
        folder = tmp_path / f"{world_size}-{policy.long_sequences}"
        folder.mkdir()
        run = Run(folder, world_size).build(fasta, str(checkpoint), policy).embed("bfloat16").merge()
        found.append(open_embeddings(run.embeddings)[:])
    assert (found[0] == found[1]).all()
    short = np.array(LENGTHS) <= 60
    assert (found[0][short] == found[2][short]).all()
    assert (found[0][~short] != found[2][~short]).any(axis=1).all()


def test_the_windows_of_a_sequence_stay_together_when_a_pack_is_split(proteins: tuple, tmp_path: Path) -> None:
    fasta, checkpoint = proteins[:2]
    index = open_index(Run(tmp_path, 1).build(fasta, str(checkpoint), POLICIES["half"]).index)
    packs = [whole_pack(index, number) for number in range(index.num_packs)]
    assert [pack.windows is not None for pack in packs] == [True, True]
    for pack in packs:
        pieces = pack.split(150)
        assert len(pieces) > 1
        assert torch.equal(torch.cat([piece.tokens for piece in pieces]), pack.tokens)
        assert sum(len(piece.windows.begins) - 1 for piece in pieces) == len(pack.windows.begins) - 1
        for piece in pieces:
            assert piece.windows.begins[-1] == len(piece.lengths) == len(piece.cu_seqlens) - 1
            assert int(piece.cu_seqlens[-1]) == len(piece.tokens) == piece.lengths.sum()
