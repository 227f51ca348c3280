"""Embedding from Python: the workflow's vectors, in the order and the shapes asked for."""

import gc
import logging
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import seqmill
from families import EACH, ONE_EACH, PROTEINS, SMALL_ESM2, WINDOWS, Family, broken_model
from pipeline import MODEL, Run
from reference import ALPHABET, fair_esm_hidden, fair_esm_model, save_checkpoint
from seqmill.api import embedder as module
from seqmill.api import load as load_module
from seqmill.model import dnabert_s
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.outputs import Outputs
from sequences import random_sequences, relative_error


def load(family: Family, precision: str = "float32") -> seqmill.Embedder:
    return seqmill.load(family.model, device="cpu", precision=precision, **asdict(family.policy))


@pytest.fixture(scope="module")
def small() -> seqmill.Embedder:
    return load(PROTEINS)


@pytest.mark.parametrize("family", EACH, ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_bits_are_those_of_the_workflow(family: Family, precision: str, tmp_path: Path) -> None:
    fasta = family.write_odd(tmp_path)
    run = Run(tmp_path, 2).build(fasta, family.model, family.policy).embed(precision).merge()
    vectors = load(family, precision).embed(fasta)
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, seqmill.open_embeddings(run.embeddings).array)


@pytest.mark.parametrize("family", ONE_EACH, ids=str)
def test_the_vectors_are_those_of_the_reference(family: Family) -> None:
    sequences = family.sequences
    vectors = seqmill.load(family.seeded_model, precision="float32", **asdict(family.policy)).embed(sequences)
    for vector, sequence in zip(vectors, sequences, strict=True):
        assert relative_error(vector, family.expected(sequence, "mean")) < 5e-5


def test_layers_and_poolings_in_lists_are_axes(small: seqmill.Embedder, tmp_path: Path) -> None:
    fasta = PROTEINS.write_odd(tmp_path)
    outputs = Outputs((6, 2), ("mean", "max", "std"))
    run = Run(tmp_path, 1).build(fasta, PROTEINS.model).embed(outputs=outputs).merge()
    found = small.embed(fasta, layers=[-1, 2], pooling=["mean", "max", "std"])
    assert found.shape == (15, 2, 3, 64)
    for i, layer in enumerate(outputs.layers):
        for j, pooling in enumerate(outputs.poolings):
            assert np.array_equal(found[:, i, j], seqmill.open_embeddings(run.embeddings, layer, pooling).array)
    assert np.array_equal(small.embed(fasta, layers=[2]), found[:, 1:, 0])
    assert np.array_equal(small.embed(fasta, layers=2, pooling=["max"]), found[:, 1, 1:2])
    assert np.array_equal(small.embed(fasta, layers=-5, pooling="std"), found[:, 1, 2])


def test_vectors_of_residues(small: seqmill.Embedder, tmp_path: Path) -> None:
    fasta = PROTEINS.write_odd(tmp_path)
    run = Run(tmp_path, 1).build(fasta, PROTEINS.model).embed(outputs=Outputs((-1, 3), ("mean",), "float32")).merge()
    found = small.embed(fasta, per_residue=True, layers=[-1, 3])
    last, third = (seqmill.open_embeddings(run.embeddings, layer) for layer in (-1, 3))
    assert [vectors.shape for vectors in found] == [(min(length, 1022), 2, 64) for length in last.lengths]
    for row, vectors in enumerate(found):
        assert np.array_equal(vectors[:, 0], last.residues(row))
        assert np.array_equal(vectors[:, 1], third.residues(row))
    one = small.embed("MKTV", per_residue=True)
    assert [vectors.shape for vectors in one] == [(4, 64)]


def test_vectors_of_residues_in_windows(tmp_path: Path) -> None:
    lengths = {"long_sequences": "window", "max_length": 50, "window": 40, "stride": 15}
    fasta = PROTEINS.write_odd(tmp_path)
    policy = LengthPolicy(**lengths)
    outputs = Outputs((-1,), ("mean",), "float32")
    run = Run(tmp_path, 1).build(fasta, PROTEINS.model, policy).embed(outputs=outputs).merge()
    expected = seqmill.open_embeddings(run.embeddings)
    found = seqmill.load(PROTEINS.model, precision="float32", **lengths).embed(fasta, per_residue=True)
    assert all(np.array_equal(vectors, expected.residues(row)) for row, vectors in enumerate(found))


def test_each_record_has_memory_of_its_own(small: seqmill.Embedder) -> None:
    """Not that of an equal sequence, and not that of a pack."""
    first, second, third = small.embed(["MKTV", "MKTV", "MAV"], per_residue=True)
    assert np.array_equal(first, second)
    assert not np.shares_memory(first, second)
    assert all(vectors.base is None or vectors.base.nbytes == vectors.nbytes for vectors in (first, second, third))


@pytest.mark.parametrize("family", ONE_EACH, ids=str)
def test_a_stream_has_all_records_in_order(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKS_WANTED", 1)  # small blocks
    model = load(family)
    pairs = [(f"id{number}", sequence) for number, sequence in enumerate(family.sequences * 4)]
    blocks = list(model.stream(pairs))
    assert len(blocks) > 1
    assert [id_ for ids, _ in blocks for id_ in ids] == [id_ for id_, _ in pairs]
    found = np.concatenate([vectors for _, vectors in blocks])
    assert relative_error(found, model.embed(pairs)) < 1e-6


def test_a_stream_reads_no_further_than_its_block(small: seqmill.Embedder) -> None:
    taken = []

    def sequences():
        while True:
            taken.append(1)
            yield "M" * 1000

    ids, vectors = next(small.stream(sequences()))
    assert len(ids) == len(vectors) == len(taken) < 150


def test_a_stream_of_residues_has_small_blocks(small: seqmill.Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 64 * 100)  # 100 residues
    blocks = list(small.stream(["MKTV" * 15] * 4, per_residue=True))
    assert [(ids, [vectors.shape for vectors in block]) for ids, block in blocks] == [
        (["1", "2"], [(60, 64)] * 2),
        (["3", "4"], [(60, 64)] * 2),
    ]


def test_a_stream_of_many_vectors_has_small_blocks(small: seqmill.Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 64 * 14 * 3)
    blocks = list(small.stream(["MKTV"] * 7, layers=range(7), pooling=["mean", "max"]))
    assert [ids for ids, _ in blocks] == [["1", "2", "3"], ["4", "5", "6"], ["7"]]
    assert blocks[0][1].shape == (3, 7, 2, 64)


def test_equal_sequences_are_computed_once(small: seqmill.Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    whole = module.embed_packs

    def counting(embed, index, *others):
        sizes.append(index.num_sequences)
        return whole(embed, index, *others)

    monkeypatch.setattr(module, "embed_packs", counting)
    vectors = small.embed(["MKTV", "MAV", "mktv", "MKTV*", "MAV"])
    assert sizes == [2]
    assert np.array_equal(vectors, vectors[[0, 1, 0, 0, 1]])


def test_nothing_to_embed(small: seqmill.Embedder) -> None:
    assert small.embed([]).shape == (0, 64)
    assert small.embed({}, layers=[1, 2], pooling=["mean", "std"]).shape == (0, 2, 2, 64)
    assert small.embed([], per_residue=True) == []
    assert list(small.stream([])) == []


def test_changes_are_logged_once_a_call(small: seqmill.Embedder, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        small.embed(["MKJ" * 500, "MJ*K", "MKTV"])
        assert [record.message for record in caplog.records] == [
            "letters: inner_stop_to_x: 1",
            "letters: j_to_x: 501",
            "longer than max_length=1022 and truncated: 1 records",
        ]
        caplog.clear()


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (["MKT", "MK-T"], {}, r"^sequences: record 2 \('2'\): '-' at residue 3 is not an amino-acid letter"),
        ({"a": ""}, {}, r"^sequences: record 1 \('a'\): it has no sequence"),
        (["ACGT" * 100], {}, "^sequences: the letters are A, C, G, T, U and N: this looks like nucleotides"),
        (["MKT"], {"layers": 7}, "^layer 7: the model has layers 0 to 6"),
        (["MKT"], {"layers": [-1, 6]}, "^layers must be one or more, each once, not 6, 6"),
        (["MKT"], {"layers": []}, "^layers must be one or more"),
        (["MKT"], {"pooling": "median"}, "^pooling must be of mean, "),
        (["MKT"], {"pooling": []}, "^poolings must be one or more"),
        (["MKT"], {"pooling": None}, "^layers must be one whole number or a list, and pooling one name or a list, not"),
        (["MKT"], {"layers": "last"}, "not layers='last', pooling='mean'"),
        (["MKT"], {"layers": [1.5]}, "not layers=.1.5., pooling='mean'"),
    ],
)
def test_wrong_input_is_named(small: seqmill.Embedder, given: object, options: dict, message: str) -> None:
    with pytest.raises(seqmill.SeqmillError, match=message):
        small.embed(given, **options)
    with pytest.raises(seqmill.SeqmillError, match=message):
        next(small.stream(given, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "esm3"}, "^model 'esm3' is not known"),
        ({"device": "cuda:1"}, "^device must be one of auto, cpu, cuda, not cuda:1; CUDA_VISIBLE_DEVICES chooses"),
        ({"precision": "fp16"}, "^precision must be one of auto, float32, bfloat16, float16, float8, not fp16"),
        ({"model": "prott5_xl_u50", "precision": "float16"}, "^precision float16 is not for ProtT5: T5's feed-forward"),
        (
            {"model": "esmc_300m", "precision": "float8"},
            "^precision float8 is not for ESM C: it has no kernels in float8",
        ),
        ({"long_sequences": "drop"}, "^long_sequences must be one of"),
        ({"window": 0, "long_sequences": "window"}, "^window must be 1 to"),
        (
            {"model": "esm2_t6_8M_UR50D", "long_sequences": "drop"},
            "^long_sequences must be one of",
        ),  # not fetched first
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(seqmill.SeqmillError, match=message):
        seqmill.load(**{"model": MODEL, **options})


def test_a_policy_that_rejects_names_the_sequence() -> None:
    model = seqmill.load(PROTEINS.model, long_sequences="reject", max_length=10)
    message = r"^sequences: 'b' \(record 2\) is longer than max_length=10; shorten it or leave it out"
    with pytest.raises(seqmill.SeqmillError, match=message):
        model.embed({"a": "MKT", "b": "M" * 11})
    assert model.embed(["M" * 10]).shape == (1, 64)


def test_all_invalid_sequences_are_named() -> None:
    model = seqmill.load(PROTEINS.model)
    with pytest.raises(seqmill.SeqmillError) as caught:
        model.embed({"a": "MKT", "b": "", "c": "M-T"})
    head, *lines = str(caught.value).split("\n  ")
    assert head == "sequences: 2 records are invalid; mend them, or leave them out:"
    assert [line.partition(":")[0] for line in lines] == ["record 2 ('b')", "record 3 ('c')"]
    with pytest.raises(seqmill.SeqmillError, match=r"^sequences: record 2 \('b'\): it has no sequence; remove it$"):
        next(model.stream({"a": "MKT", "b": "", "c": "MKT"}))


def test_a_stream_names_records_by_their_numbers_in_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 64 * 2)  # two records
    model = seqmill.load(PROTEINS.model, long_sequences="reject", max_length=10)
    blocks = model.stream({"a": "MKT", "b": "MKT", "c": "MKT", "d": "MKT", "e": "M" * 11})
    assert [ids for ids, _ in (next(blocks), next(blocks))] == [["a", "b"], ["c", "d"]]
    with pytest.raises(seqmill.SeqmillError, match=r"^sequences: 'e' \(record 5\) is longer"):
        next(blocks)


def test_an_overflow_is_computed_in_float32(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One hidden unit reaches over 100,000 at a W, which float16 does not hold."""
    reference = fair_esm_model(SMALL_ESM2)
    first = reference.layers[0]
    with torch.no_grad():
        reference.embed_tokens.weight[:, 5] = 0
        reference.embed_tokens.weight[ALPHABET.get_idx("W"), 5] = 50
        first.self_attn.out_proj.weight[5] = first.self_attn.out_proj.bias[5] = 0
        first.final_layer_norm.weight[5], first.final_layer_norm.bias[5] = 1, 0
        first.fc1.weight[7] = 0
        first.fc1.weight[7, 5] = 20_000
        first.fc2.weight[:, 7] = 0
    checkpoint = save_checkpoint(reference, tmp_path / "overflow.pt")
    sequences = [sequence.replace("W", "A") for sequence in random_sequences([90, 60, 1500])]
    sequences[1] = sequences[1][:30] + "W" + sequences[1][31:]
    half = seqmill.load(checkpoint, precision="float16", max_length=1500)
    vectors = half.embed(sequences)
    assert caplog.text.count("an embedding is not finite: computing it alone in float32") == 1
    expected = fair_esm_hidden(reference, sequences[1])[1:-1].mean(axis=0)
    assert relative_error(vectors[1], expected) < 1e-5
    assert half.embed([*sequences, sequences[1] * 30])[1].tolist() == vectors[1].tolist()  # the float32 model is kept


def test_a_sequence_without_a_finite_embedding_is_an_error(tmp_path: Path) -> None:
    model = seqmill.load(broken_model(PROTEINS, tmp_path, float("nan")))
    with pytest.raises(seqmill.SeqmillError, match=r"^sequences: 'b' \(record 2\) has no finite embedding, in float32"):
        model.embed({"a": "MKT", "b": "MCT"})
    assert np.isfinite(model.embed(["MKT"])).all()


def test_threads_may_share_a_model(small: seqmill.Embedder) -> None:
    batches = [random_sequences([400, 30, 1700, 5], seed=seed) for seed in range(8)]
    expected = [small.embed(batch) for batch in batches]
    found: dict[int, np.ndarray] = {}
    before = torch.get_num_threads()

    def work(number: int) -> None:
        found[number] = small.embed(batches[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[number], expected[number]) for number in range(len(batches)))
    assert torch.get_num_threads() == before


def test_an_iterable_may_use_the_library(small: seqmill.Embedder) -> None:
    sequences = random_sequences([30, 40, 50])

    def longer() -> Iterator[str]:
        for sequence in sequences:
            assert small.embed(sequence).shape == (1, 64)
            yield sequence

    assert np.array_equal(small.embed(longer()), small.embed(sequences))
    assert [ids for ids, _ in small.stream(longer())] == [["1", "2", "3"]]


def test_a_model_interrupted_while_it_grows_can_be_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seqmill.load(WINDOWS.model, precision="float16")  # its kernel has a table of biases
    short, long = ["ACGT"], ["ACGTTGCA" * 500]
    model.embed(short)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(dnabert_s, "make_biases", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.embed(long)
    assert np.isfinite(model.embed(long)).all()


def test_after_ctrl_c_a_model_can_be_used_again(small: seqmill.Embedder) -> None:
    sequences = random_sequences([1000] * 4000)
    before = torch.get_num_threads()
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        small.embed(sequences)
    assert torch.get_num_threads() == before
    assert small.embed(sequences[:1]).shape == (1, 64)


def test_one_call_keeps_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, alive = [], []
    make = load_module.load

    def load_counting(model: str, **options: object) -> seqmill.Embedder:
        gc.collect()
        alive.append(sum(reference() is not None for reference in loaded))
        made = make(model, **options)
        loaded.append(weakref.ref(made))
        return made

    monkeypatch.setattr(load_module, "load", load_counting)
    options = {"model": PROTEINS.model, "precision": "float32"}
    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(lambda _: seqmill.embed(["MKT"], **options), range(4))
    assert all(np.array_equal(first, other) for other in others)
    assert [vectors.shape for vectors in seqmill.embed("MKT", per_residue=True, **options)] == [(3, 64)]
    assert len(loaded) == 1
    seqmill.embed("MKT", **{**options, "precision": "bfloat16"})
    assert (len(loaded), alive) == (2, [0, 0])  # the first is released before the second is loaded


def test_a_bar_is_shown_only_if_asked_for(small: seqmill.Embedder, capsys: pytest.CaptureFixture[str]) -> None:
    small.embed(["MKT"])
    list(small.stream(["MKT"]))
    assert capsys.readouterr() == ("", "")
    small.embed(["MKT"], progress=True)
    assert "5.00/5.00" in capsys.readouterr().err
    list(small.stream(["MKT", "MAVL"], progress=True))
    assert "11.0/11.0" in capsys.readouterr().err


def test_a_model_describes_itself(caplog: pytest.LogCaptureFixture) -> None:
    model = seqmill.load(MODEL, precision="float32", device="cpu")
    assert repr(model) == f"<Embedder {MODEL}, 320 dimensions, float32 on cpu>"
    assert (model.dim, model.num_layers, model.trained, model.policy.max_length) == (320, 6, False, 1022)
    assert "UNTRAINED WEIGHTS" in caplog.text
