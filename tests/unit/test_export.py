"""Every export says what the embeddings file says, read by the library that its users would use."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas
import pytest
import torch

from embeddings_file import random_blocks, write_blocks, write_embeddings
from pipeline import SCRIPTS, Run, run_script
from seqpack import Embeddings, SeqpackError, export_blocks, open_embeddings
from seqpack.export import WRITERS, export_embeddings
from seqpack.export_names import UniqueNames, file_name
from sequences import random_sequences

HEADERS = [
    "a the first",
    "a the second",
    "a",
    "a-1",
    "b/c with a slash",
    "b_c",
    "",
    "",
    "NA",
    "nan",
    "1e5",
    ".",
    "..",
    "NP_051037.1 photosystem II",
    "sp|P12345|NAME_HUMAN A protein, OS=Homo sapiens",
    "tr|P12345|OTHER_HUMAN",
    "P12345-1",
    "é日本|x",
    "line\u2028separator",
    'quote"and,comma',
    "x" * 300,
    "x" * 299 + "y",
    "日" * 100,
]
WIDTH = 320


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("results")
    sequences = random_sequences([20 - row % 7 for row in range(len(HEADERS))])
    records = zip(HEADERS, sequences, strict=True)
    (folder / "f.faa").write_text("".join(f">{header}\n{sequence}\n" for header, sequence in records))
    return Run(folder, 1).build(folder / "f.faa").embed().merge()


@pytest.fixture(scope="module")
def embeddings(run: Run) -> Embeddings:
    embeddings = open_embeddings(run.embeddings)
    assert embeddings.ids == [header.partition(" ")[0] for header in HEADERS]
    return embeddings


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_blocks, "BLOCK_BYTES", 4 * WIDTH * 5)
    monkeypatch.setattr(export_blocks, "ID_BLOCK", 3)


@pytest.fixture(scope="module")
def no_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embeddings(tmp_path_factory.mktemp("none") / "none.h5", np.empty((0, WIDTH)))


def test_parquet(embeddings: Embeddings, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "e.parquet"
    export_embeddings(embeddings.path, path, "parquet")
    file = parquet.ParquetFile(path)
    assert [str(field.type) for field in file.schema_arrow] == [
        "string",
        "int32",
        f"fixed_size_list<element: float>[{WIDTH}]",
    ]
    assert file.num_row_groups == -(-len(HEADERS) // 5)
    assert json.loads(file.schema_arrow.metadata[b"seqpack"]) == embeddings.attrs
    frame = pandas.read_parquet(path)
    assert frame["id"].tolist() == embeddings.ids
    assert frame["length"].tolist() == embeddings.lengths.tolist()
    found = np.stack(frame["embedding"])
    assert found.dtype == np.float32
    assert np.array_equal(found, embeddings.array)


def test_npy(embeddings: Embeddings, tmp_path: Path) -> None:
    path = tmp_path / "e.npy"
    export_embeddings(embeddings.path, path, "npy")
    array = np.load(path, mmap_mode="r")
    assert isinstance(array, np.memmap)
    assert array.dtype == np.float32
    assert np.array_equal(array, embeddings.array)
    assert ids_beside(path) == embeddings.ids


def test_h5ad_as_anndata_reads_it(embeddings: Embeddings, tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata", reason="needs Python 3.12 beside pandas 3")
    path = tmp_path / "e.h5ad"
    export_embeddings(embeddings.path, path, "h5ad")
    data = anndata.read_h5ad(path)
    assert np.array_equal(data.X, embeddings.array)
    assert data.obs["id"].tolist() == embeddings.ids
    assert data.obs["length"].tolist() == embeddings.lengths.tolist()
    assert dict(data.uns) == embeddings.attrs
    assert data.var_names.tolist() == [str(n) for n in range(WIDTH)]
    theirs = anndata.AnnData(obs=pandas.DataFrame(index=embeddings.ids))
    theirs.obs_names_make_unique()
    assert data.obs_names.tolist() == theirs.obs_names.tolist()
    assert np.array_equal(anndata.read_h5ad(path, backed="r")[3:5].to_memory().X, embeddings.array[3:5])
    data.write_h5ad(tmp_path / "again.h5ad")
    assert np.array_equal(anndata.read_h5ad(tmp_path / "again.h5ad").X, embeddings.array)


def test_h5ad_follows_the_specification(embeddings: Embeddings, tmp_path: Path) -> None:
    """Where AnnData can't be installed, this much is checked all the same."""
    path = tmp_path / "e.h5ad"
    export_embeddings(embeddings.path, path, "h5ad")
    with h5py.File(path) as file:
        assert dict(file.attrs) == {"encoding-type": "anndata", "encoding-version": "0.1.0"}
        encodings: dict[str, str] = {}
        file.visititems(lambda name, element: encodings.update({name: element.attrs["encoding-type"]}))
        assert {encodings[name] for name in ("layers", "obsm", "obsp", "uns", "varm", "varp")} == {"dict"}
        assert {encodings[name] for name in ("obs", "var")} == {"dataframe"}
        assert {encodings[name] for name in ("obs/_index", "obs/id", "var/_index")} == {"string-array"}
        assert file["obs"].attrs["_index"] == "_index"
        assert file["obs"].attrs["column-order"].tolist() == ["id", "length"]
        assert np.array_equal(file["X"], embeddings.array)
        assert file["obs/id"].asstr()[:].tolist() == embeddings.ids
        names = file["obs/_index"].asstr()[:].tolist()
        assert len(set(names)) == len(names)
        assert names[:4] == ["a", "a-2", "a-3", "a-1"]
        assert file["uns/model"].asstr()[()] == embeddings.attrs["model"]
        assert encodings["uns/shard_format"] == "numeric-scalar"


def test_h5_as_uniprot_says_to_read_it(embeddings: Embeddings, tmp_path: Path) -> None:
    path = tmp_path / "e.h5"
    export_embeddings(embeddings.path, path, "h5")
    rows = names_in(tmp_path / "e.h5.names.tsv")
    with h5py.File(path) as file:
        assert len(file) == len(HEADERS)
        for name, vector in file.items():
            id_, row = rows[name]
            assert vector.attrs["original_id"] == id_ == embeddings.ids[row]
            assert np.array_equal(np.array(vector), embeddings.array[row])
        assert np.array_equal(file["NP_051037.1"], embeddings["NP_051037.1"])
        assert np.array_equal(file["P12345"], embeddings["sp|P12345|NAME_HUMAN"])
        assert np.array_equal(file["P12345-1"], embeddings["P12345-1"])
        assert np.array_equal(file["P12345-2"], embeddings["tr|P12345|OTHER_HUMAN"])
        assert file["b_c"].attrs["original_id"] == "b/c"
        assert file["b_c-1"].attrs["original_id"] == "b_c"
        assert file.attrs["fingerprint"] == embeddings.attrs["fingerprint"]


def test_pt_as_fair_esm_writes_it(run: Run, embeddings: Embeddings, tmp_path: Path) -> None:
    folder = tmp_path / "pt"
    export_embeddings(run.embeddings, folder, "pt", run.folder / "records.tsv.gz")
    names = names_in(folder / "names.tsv")
    assert {path.stem for path in folder.glob("*.pt")} == set(names)
    assert sorted(row for _, row in names.values()) == list(range(len(HEADERS)))
    for name, (id_, row) in names.items():
        content = torch.load(folder / f"{name}.pt")
        assert set(content) == {"label", "mean_representations"}
        assert content["label"] == HEADERS[row]
        assert id_ == embeddings.ids[row]
        vector = content["mean_representations"][6]
        assert vector.untyped_storage().nbytes() == 4 * WIDTH  # not that of a block
        assert np.array_equal(vector.numpy(), embeddings.array[row])
    assert (folder / "sp|P12345|NAME_HUMAN.pt").is_file()


def test_pt_without_records_and_of_another_pooling(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.h5", np.ones((1, 3)), ["a"], pooling="cls", layers="2")
    export_embeddings(path, tmp_path / "pt", "pt")
    content = torch.load(tmp_path / "pt/a.pt")
    assert content["label"] == "a"
    assert content["bos_representations"][2].tolist() == [1, 1, 1]


def test_pt_refuses_records_of_another_merge_and_folders_that_exist(run: Run, tmp_path: Path) -> None:
    other = write_embeddings(tmp_path / "other.h5", np.ones((2, 3)), ["a", "another"])
    records = run.folder / "records.tsv.gz"
    with pytest.raises(SeqpackError, match=r"records\.tsv\.gz: row 1 is 'a' there, 'another'"):
        export_embeddings(other, tmp_path / "pt", "pt", records)
    with pytest.raises(SeqpackError, match=r"other\.h5: not a readable records\.tsv\.gz"):
        export_embeddings(other, tmp_path / "pt", "pt", other)
    assert [path.name for path in tmp_path.iterdir()] == ["other.h5"]
    (tmp_path / "pt").mkdir()
    with pytest.raises(SeqpackError, match="pt: exists; remove it"):
        export_embeddings(other, tmp_path / "pt", "pt")
    assert not list((tmp_path / "pt").iterdir())


def test_faiss(embeddings: Embeddings, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    path = tmp_path / "e.faiss"
    export_embeddings(embeddings.path, path, "faiss")
    index = faiss.read_index(str(path))
    assert (type(index).__name__, index.ntotal, index.d) == ("IndexFlatIP", len(HEADERS), WIDTH)
    exact = np.array(embeddings.array, np.float64)
    unit = (exact / np.linalg.norm(exact, axis=1, keepdims=True)).astype(np.float32)
    assert np.allclose(index.reconstruct_n(0, index.ntotal), unit, rtol=2**-23, atol=0)
    scores, rows = index.search(unit, 1)
    assert rows[:, 0].tolist() == list(range(len(HEADERS)))
    assert np.allclose(scores, 1, atol=1e-6)
    assert ids_beside(path) == embeddings.ids
    # The same bytes as FAISS would have written.
    theirs = faiss.IndexFlatIP(WIDTH)
    theirs.add(index.reconstruct_n(0, index.ntotal))
    assert faiss.serialize_index(theirs).tobytes() == path.read_bytes()


@pytest.mark.parametrize("format_name", sorted(set(WRITERS) - {"h5_residues"}))
def test_no_records(format_name: str, no_rows: Path, tmp_path: Path) -> None:
    output = tmp_path / f"e.{format_name}"
    if format_name in ("parquet", "faiss"):
        pytest.importorskip({"parquet": "pyarrow", "faiss": "faiss"}[format_name])
    export_embeddings(no_rows, output, format_name)
    if format_name == "parquet":
        assert len(pandas.read_parquet(output)) == 0
    elif format_name == "npy":
        assert np.load(output).shape == (0, WIDTH)
    elif format_name == "h5ad":
        with h5py.File(output) as file:
            assert file["X"].shape == (0, WIDTH)
    elif format_name == "h5":
        with h5py.File(output) as file:
            assert len(file) == 0
    elif format_name == "faiss":
        import faiss

        assert faiss.read_index(str(output)).ntotal == 0
    else:
        assert [path.name for path in output.iterdir()] == ["names.tsv"]


@pytest.mark.parametrize(
    ("format_name", "module", "package"), [("parquet", "pyarrow", "pyarrow"), ("faiss", "faiss", "faiss-cpu")]
)
def test_a_missing_package_is_named(
    format_name: str, module: str, package: str, no_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SeqpackError, match=rf"needs {package}: pip install 'seqpack\[export\]'"):
        export_embeddings(no_rows, tmp_path / "output", format_name)
    assert not list(tmp_path.iterdir())


def test_the_source_is_never_replaced(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.h5", np.ones((2, 3)))
    before = path.read_bytes()
    for format_name in WRITERS:
        with pytest.raises(SeqpackError, match="is the input as well as the output"):
            export_embeddings(path, path, format_name)
    with pytest.raises(SeqpackError, match="no format is called 'csv'"):
        export_embeddings(path, tmp_path / "e.csv", "csv")
    assert path.read_bytes() == before


def test_a_file_that_ends_early_leaves_nothing(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.h5", np.ones((7, WIDTH)))
    embeddings = open_embeddings(path)
    os.truncate(path, embeddings.array.offset + 4 * WIDTH * 6)
    for format_name in ("npy", "h5", "h5ad", "pt"):
        with pytest.raises(SeqpackError, match=r"e\.h5"):
            WRITERS[format_name](embeddings, tmp_path / f"new.{format_name}")
    assert [path.name for path in tmp_path.iterdir()] == ["e.h5"]


def test_unique_names() -> None:
    generator = np.random.default_rng(5)
    ids = ["".join(generator.choice(list("a-1"), generator.integers(0, 4), replace=True).tolist()) for _ in range(2000)]
    unique = UniqueNames(ids)
    names = [unique.next(id_) for id_ in ids]
    assert len(set(names)) == len(ids)
    first = {id_: names[ids.index(id_)] for id_ in set(ids)}
    assert all(id_ == name for id_, name in first.items())
    assert all(name.startswith(id_) for id_, name in zip(ids, names, strict=True))


def test_file_names_fit_a_file_system(tmp_path: Path) -> None:
    for id_ in ("日" * 300, "a/b\x00c\n", "", ".", ".."):
        path = tmp_path / f"{file_name(id_)}-1000000.pt"
        path.touch()
        assert path.parent == tmp_path
        assert path.is_file()


MEMORY = """
import sys
from pathlib import Path
from seqpack.export import export_embeddings
source, small, format_name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
# Not getrusage: its peak begins with that of the parent.
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10
export_embeddings(small, small.with_name(f"small.{format_name}"), format_name)
before = peak()
export_embeddings(source, source.with_name(f"large.{format_name}"), format_name)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = (400_000, WIDTH)
    return write_blocks(tmp_path_factory.mktemp("large") / "large.h5", shape, random_blocks(shape))


@pytest.mark.parametrize("format_name", ["parquet", "npy", "h5ad", "faiss"])
def test_memory_is_bounded(format_name: str, large: Path, no_rows: Path) -> None:
    if format_name in ("parquet", "faiss"):
        pytest.importorskip({"parquet": "pyarrow", "faiss": "faiss"}[format_name])
    command = [sys.executable, "-c", MEMORY, large, no_rows, format_name]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    large.with_name(f"large.{format_name}").unlink()
    assert int(process.stdout) < 384 < open_embeddings(large).array.nbytes >> 20  # MB


def test_the_program(run: Run, embeddings: Embeddings, tmp_path: Path) -> None:
    assert f"{{{','.join(WRITERS)}}}" in run_script("export.py", "--help").stdout
    arguments = ("--embeddings", run.embeddings, "--format", "npy", "--output", tmp_path / "new/e.npy")
    process = run_script("export.py", *arguments)
    assert process.returncode == 0, process.stderr
    assert "UNTRAINED WEIGHTS" in process.stderr
    assert np.array_equal(np.load(tmp_path / "new/e.npy"), embeddings.array)
    process = run_script("export.py", "--embeddings", tmp_path / "no.h5", *arguments[2:])
    assert process.returncode == 1
    assert "no such embeddings file" in process.stderr
    assert "Traceback" not in process.stderr


def ids_beside(path: Path) -> list[str]:
    with path.with_name(f"{path.name}.ids.txt").open(encoding="utf-8") as file:
        return [line.removesuffix("\n") for line in file]


def names_in(path: Path) -> dict[str, tuple[str, int]]:
    """Return the id and the row of each name, which are unique."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [(row["name"], (row["id"], int(row["row"]))) for row in csv.DictReader(file, delimiter="\t")]
    assert len(dict(rows)) == len(rows)
    return dict(rows)
