"""Reading results in Python, as docs/reference/output-format.md describes."""

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import seqmill
from pipeline import SCRIPTS, Run
from seqmill import SeqmillError, open_embeddings
from seqmill.spec.outputs import Outputs
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
    assert not attrs["trained_weights"]
    assert "UNTRAINED WEIGHTS" in attrs["warning"]
    assert (attrs["precision"], attrs["pooling"], attrs["layers"]) == ("float32", "mean", "6")
    assert (attrs["max_length"], attrs["long_sequences"]) == (1022, "truncate")
    assert attrs["num_records"] == 4
    assert "UNTRAINED" in repr(open_embeddings(path))


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
