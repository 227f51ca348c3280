"""Reading results in Python, as docs/reference/output-format.md describes."""

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import seqmill
from embeddings_file import write_embeddings
from pipeline import SCRIPTS, Run
from seqmill import SeqmillError, open_embeddings
from seqmill.spec.outputs import Outputs
from seqmill.store import embeddings as stored
from sequences import random_sequences


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    ids = ["a", "twice", "b/c", "twice"]
    records = zip(ids, random_sequences([9, 8, 7, 6]), strict=True)
    (folder / "f.faa").write_text("".join(f">{id_}\n{sequence}\n" for id_, sequence in records))
    return Run(folder, 1).build(folder / "f.faa").embed().merge().embeddings


def test_by_number_slice_list_and_id(path: Path) -> None:
    embeddings = open_embeddings(path)
    with h5py.File(path) as file:
        array = file["embeddings"][:]
    assert len(embeddings) == 4
    assert embeddings.ids == ["a", "twice", "b/c", "twice"]
    assert embeddings.lengths.tolist() == [9, 8, 7, 6]
    assert (embeddings[2] == array[2]).all()
    assert (embeddings[-1] == array[3]).all()
    assert (embeddings[1:3] == array[1:3]).all()
    assert (embeddings[[3, 0]] == array[[3, 0]]).all()
    assert (embeddings["b/c"] == array[2]).all()
    assert embeddings["b/c"].shape == (320,)
    assert (embeddings["twice"] == array[[1, 3]]).all()
    assert (embeddings[["b/c", "a", "twice"]] == array[[2, 0, 1, 3]]).all()
    assert "a" in embeddings
    assert "z" not in embeddings
    assert (np.stack(list(embeddings)) == array).all()
    assert embeddings[0].dtype == np.float32
    embeddings[0][:] = 0  # a copy; the file does not change
    assert (open_embeddings(path)[0] == array[0]).all()


def test_unknown_ids_and_rows(path: Path) -> None:
    embeddings = open_embeddings(path)
    with pytest.raises(KeyError, match="no record has the id 'z'"):
        embeddings["z"]
    with pytest.raises(IndexError):
        embeddings[4]


def test_to_pandas(path: Path) -> None:
    frame = open_embeddings(path).to_pandas()
    assert frame.shape == (4, 320)
    assert frame.index.tolist() == ["a", "twice", "b/c", "twice"]
    assert (frame.loc["b/c"].to_numpy() == open_embeddings(path)[2]).all()


def test_attributes_describe_the_run(path: Path) -> None:
    attrs = open_embeddings(path).attrs
    assert attrs["model"] == "untrained:esm2_t6_8M_UR50D"
    assert attrs["trained_weights"] == 0
    assert "UNTRAINED WEIGHTS" in attrs["warning"]
    assert (attrs["precision"], attrs["pooling"], attrs["layers"]) == ("float32", "mean", "6")
    assert (attrs["max_length"], attrs["long_sequences"]) == (1022, "truncate")
    assert attrs["num_records"] == 4
    assert "UNTRAINED" in repr(open_embeddings(path))


def test_no_attribute_is_an_enum(path: Path) -> None:
    """R's rhdf5 reads the type of h5py's bool as NA."""
    with h5py.File(path) as file:
        kinds = {name: file.attrs.get_id(name).get_type().get_class() for name in file.attrs}
    assert {name for name, kind in kinds.items() if kind == h5py.h5t.INTEGER} >= {"trained_weights", "num_records"}
    assert set(kinds.values()) <= {h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.STRING}


def test_wrong_files_are_refused_by_name(path: Path, tmp_path: Path) -> None:
    with pytest.raises(SeqmillError, match=r"none\.h5: no such embeddings file"):
        open_embeddings(tmp_path / "none.h5")
    with pytest.raises(SeqmillError, match=r"is a folder; name the embeddings file in it"):
        open_embeddings(tmp_path)
    truncated = tmp_path / "truncated.h5"
    truncated.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SeqmillError, match=r"truncated\.h5"):
        open_embeddings(truncated)
    with pytest.raises(SeqmillError, match="is not a seqmill embeddings file"):
        open_embeddings(path.with_name("index.h5"))


def test_the_package_has_its_version_and_imports_lightly() -> None:
    assert seqmill.__version__ == "0.1.0"
    with pytest.raises(AttributeError):
        seqmill.nothing  # noqa: B018
    code = "import sys, seqmill; assert not {'numpy', 'h5py', 'torch', 'pandas'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(SCRIPTS)})


def test_negative_layers_count_from_the_end(tmp_path: Path) -> None:
    fasta = tmp_path / "p.faa"
    fasta.write_text(">one\nMKTAYIAKQR\n")
    run = Run(tmp_path, 1).build(fasta).embed(outputs=Outputs((2, -1))).merge()
    assert open_embeddings(run.embeddings).layer == 2
    last = open_embeddings(run.embeddings, layer=-1)
    assert last.layer == 6
    assert (last[0] == open_embeddings(run.embeddings, layer=6)[0]).all()
    with pytest.raises(SeqmillError, match="has no such output"):
        open_embeddings(run.embeddings, layer=-2)


def test_shape_blocks_and_torch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = open_embeddings(path)
    assert embeddings.shape == (4, 320)
    monkeypatch.setattr(stored, "BLOCK_BYTES", 3 * 320 * 4)
    blocks = list(embeddings.blocks())
    assert [ids for ids, _ in blocks] == [["a", "twice", "b/c"], ["twice"]]
    assert (np.concatenate([vectors for _, vectors in blocks]) == embeddings[:]).all()
    tensor = embeddings.to_torch()
    assert tensor.dtype == torch.float32
    assert (tensor.numpy() == embeddings[:]).all()


def test_the_nearest_records_leave_out_the_record_itself(path: Path) -> None:
    embeddings = open_embeddings(path)
    unit = embeddings[:] / np.linalg.norm(embeddings[:], axis=1, keepdims=True)
    cosines = unit @ unit[2]
    order = [row for row in np.argsort(-cosines) if row != 2]
    found = embeddings.nearest("b/c", 2)
    assert found.columns.tolist() == ["id", "row", "score"]
    assert found["row"].tolist() == order[:2]
    assert found["id"].tolist() == [embeddings.ids[row] for row in order[:2]]
    assert np.allclose(found["score"], cosines[order[:2]], atol=1e-6)
    assert embeddings.nearest(-2, 2).equals(found)
    assert len(embeddings.nearest(0, 10)) == 3


def test_which_record_is_meant_must_be_clear(path: Path) -> None:
    embeddings = open_embeddings(path)
    with pytest.raises(
        SeqmillError, match=r"several sequences have the id 'twice': use a row instead, one of \[1, 3\]"
    ):
        embeddings.nearest("twice")
    with pytest.raises(KeyError, match="no record has the id 'z'"):
        embeddings.nearest("z")
    with pytest.raises(IndexError):
        embeddings.nearest(4)
    with pytest.raises(SeqmillError, match=r"nearest takes a record's id or row; seqmill\.search takes vectors"):
        embeddings.nearest(embeddings[0])
    with pytest.raises(SeqmillError, match="k is 0; ask for at least one"):
        embeddings.nearest("a", 0)


def test_records_of_one_sequence_are_each_others_neighbors(tmp_path: Path) -> None:
    vectors = np.array([[1, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    embeddings = open_embeddings(write_embeddings(tmp_path / "e.h5", vectors, ["a", "b", "a", "c"]))
    assert embeddings.nearest("a", 1)["row"].tolist() == [2]
    assert embeddings.nearest(2, 2)["row"].tolist() == [0, 3]


def test_a_file_is_closed_at_the_end_of_its_block(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.h5", np.ones((2, 3)))
    with open_embeddings(path) as embeddings:
        assert str(path) in Path("/proc/self/maps").read_text()
    assert str(path) not in Path("/proc/self/maps").read_text()
    for read in (lambda: embeddings[0], lambda: embeddings.shape, embeddings.to_pandas, lambda: embeddings.residues(0)):
        with pytest.raises(SeqmillError, match=r"e\.h5: is closed; open it again"):
            read()
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        embeddings.nothing  # noqa: B018


def test_only_public_names_are_listed() -> None:
    names = ["Embedder", "Embeddings", "SeqmillError", "__version__", "embed", "load", "open_embeddings", "search"]
    assert dir(seqmill) == names
    assert all(hasattr(seqmill, name) for name in names)
