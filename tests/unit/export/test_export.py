"""Every export has the content of the embeddings file when read by the library that its users would use."""

import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas
import pytest
import torch
import yaml

from embeddings_file import random_blocks, write_blocks, write_embeddings
from families import write_fasta
from pipeline import MODEL, REPOSITORY, SCRIPTS, Run, run_script
from seqmill import Embeddings, SeqmillError, open_embeddings
from seqmill.export.export import export_embeddings
from seqmill.export.formats import FORMATS
from seqmill.export.names import NAME_BYTES, UNNAMED, file_name, hdf5_name, unique_names
from seqmill.merge.merge import merge_shards
from seqmill.spec.outputs import Outputs
from seqmill.store import embeddings as stored
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
    assert embeddings.ids == ids_of_headers()
    return embeddings


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "BLOCK_BYTES", 4 * WIDTH * 5)
    monkeypatch.setattr(stored, "ID_BLOCK", 3)


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
    assert json.loads(file.schema_arrow.metadata[b"seqmill"]) == embeddings.attrs
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


@pytest.mark.parametrize(("format_name", "separator"), [("csv", ","), ("tsv", "\t")])
def test_csv_and_tsv_as_pandas_reads_them(
    format_name: str, separator: str, embeddings: Embeddings, tmp_path: Path
) -> None:
    path = tmp_path / f"e.{format_name}"
    export_embeddings(embeddings.path, path, format_name)
    frame = pandas.read_csv(path, sep=separator, dtype={"id": str}, keep_default_na=False)
    assert frame.columns.tolist() == ["id", "length", *(f"d{number}" for number in range(WIDTH))]
    assert frame["id"].tolist() == embeddings.ids
    assert frame["length"].tolist() == embeddings.lengths.tolist()
    assert np.array_equal(frame.iloc[:, 2:].to_numpy(np.float32), embeddings.array)


def test_every_float32_survives_csv(tmp_path: Path) -> None:
    """Also those whose shortest decimals would be rounded to their neighbor by way of float64."""
    bits = np.random.default_rng(2).integers(0, 1 << 32, 20_000, np.uint32)
    values = np.concatenate([bits.view(np.float32), np.float32([0, -0.0, 1e-45, 7.0385307e-26, 3.4028235e38])])
    values = values[np.isfinite(values)][:20_000].reshape(-1, 8)[:2_000]
    path = write_embeddings(tmp_path / "e.h5", values)
    export_embeddings(path, tmp_path / "e.csv", "csv")
    found = pandas.read_csv(tmp_path / "e.csv").iloc[:, 2:].to_numpy(np.float32)
    assert found.tobytes() == values.tobytes()


@pytest.mark.skipif(not shutil.which("Rscript"), reason="needs R")
@pytest.mark.parametrize("format_name", ["csv", "tsv"])
def test_csv_and_tsv_as_r_reads_them(format_name: str, embeddings: Embeddings, tmp_path: Path) -> None:
    path = tmp_path / f"e.{format_name}"
    export_embeddings(embeddings.path, path, format_name)
    read = {"csv": "read.csv", "tsv": "read.delim"}[format_name]
    code = f"""x <- {read}("{path}", colClasses = c(id = "character"), na.strings = character())
    stopifnot(names(x)[1:3] == c("id", "length", "d0"))
    writeBin(as.vector(t(as.matrix(x[-(1:2)]))), "{tmp_path}/values", size = 4)
    writeLines(enc2utf8(x$id), file("{tmp_path}/ids", "w", encoding = "UTF-8"), useBytes = TRUE)"""
    subprocess.run(["Rscript", "-e", code], check=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert (tmp_path / "ids").read_text(encoding="utf-8").split("\n")[:-1] == embeddings.ids
    assert np.array_equal(np.fromfile(tmp_path / "values", np.float32), embeddings.array.ravel())


def test_h5ad_follows_the_specification(embeddings: Embeddings, tmp_path: Path) -> None:
    """tests/fuzz/test_anndata.py reads one with AnnData itself."""
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


def test_h5_reads_as_uniprot_documents(embeddings: Embeddings, tmp_path: Path) -> None:
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
        assert file["b_c"].attrs["original_id"] == "b_c"
        assert file["b_c-1"].attrs["original_id"] == "b/c"
        assert file.attrs["fingerprint"] == embeddings.attrs["fingerprint"]


def test_pt_has_fair_esm_s_format(run: Run, embeddings: Embeddings, tmp_path: Path) -> None:
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
        assert vector.untyped_storage().nbytes() == 4 * WIDTH  # not the storage of a whole block
        assert np.array_equal(vector.numpy(), embeddings.array[row])
    assert (folder / "sp|P12345|NAME_HUMAN.pt").is_file()


def test_pt_without_records_and_with_another_pooling(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.h5", np.ones((1, 3)), ["a"], pooling="cls", layers="2")
    export_embeddings(path, tmp_path / "pt", "pt")
    content = torch.load(tmp_path / "pt/a.pt")
    assert content["label"] == "a"
    assert content["bos_representations"][2].tolist() == [1, 1, 1]


def test_pt_refuses_records_of_another_merge_and_existing_folders(run: Run, tmp_path: Path) -> None:
    other = write_embeddings(tmp_path / "other.h5", np.ones((2, 3)), ["a", "another"])
    records = run.folder / "records.tsv.gz"
    with pytest.raises(SeqmillError, match=r"records\.tsv\.gz: row 1 is 'a' here, 'another'"):
        export_embeddings(other, tmp_path / "pt", "pt", records)
    fewer = write_embeddings(tmp_path / "other.h5", np.ones((len(HEADERS) + 1, 3)), [*ids_of_headers(), "z"])
    with pytest.raises(SeqmillError, match=rf"records\.tsv\.gz: has no row {len(HEADERS)}, 'z' in the embeddings"):
        export_embeddings(fewer, tmp_path / "pt", "pt", records)
    with pytest.raises(SeqmillError, match=r"other\.h5: not a readable records\.tsv\.gz"):
        export_embeddings(other, tmp_path / "pt", "pt", other)
    assert [path.name for path in tmp_path.iterdir()] == ["other.h5"]
    (tmp_path / "pt").mkdir()
    with pytest.raises(SeqmillError, match="pt: exists; remove it"):
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
    # FAISS itself writes the same bytes.
    theirs = faiss.IndexFlatIP(WIDTH)
    theirs.add(index.reconstruct_n(0, index.ntotal))
    assert faiss.serialize_index(theirs).tobytes() == path.read_bytes()


@pytest.mark.parametrize("format_name", sorted(set(FORMATS) - {"h5_residues"}))
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
    elif format_name in ("csv", "tsv"):
        (header,) = output.read_text().splitlines()
        assert header.startswith(f"id{',' if format_name == 'csv' else chr(9)}length")
    else:
        assert [path.name for path in output.iterdir()] == ["names.tsv"]


@pytest.mark.parametrize(
    ("format_name", "module", "package"), [("parquet", "pyarrow", "pyarrow"), ("faiss", "faiss", "faiss-cpu")]
)
def test_a_missing_package_is_named(
    format_name: str, module: str, package: str, no_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SeqmillError, match=rf"needs {package}: pip install 'seqmill\[export\]'"):
        export_embeddings(no_rows, tmp_path / "output", format_name)
    assert not list(tmp_path.iterdir())


def test_the_source_is_never_replaced(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.h5", np.ones((2, 3)))
    before = path.read_bytes()
    for format_name in FORMATS:
        with pytest.raises(SeqmillError, match="is the input as well as the output"):
            export_embeddings(path, path, format_name)
    with pytest.raises(SeqmillError, match="no format is called 'xlsx'"):
        export_embeddings(path, tmp_path / "e.xlsx", "xlsx")
    assert path.read_bytes() == before


def test_a_file_that_ends_early_leaves_nothing(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.h5", np.ones((7, WIDTH)))
    embeddings = open_embeddings(path)
    os.truncate(path, embeddings.array.offset + 4 * WIDTH * 6)
    for format_name in ("npy", "h5", "h5ad", "pt"):
        with pytest.raises(SeqmillError, match=r"e\.h5"):
            FORMATS[format_name].write(embeddings, tmp_path / f"new.{format_name}", None)
    assert [path.name for path in tmp_path.iterdir()] == ["e.h5"]


def test_unique_names() -> None:
    generator = np.random.default_rng(5)
    ids = ["".join(generator.choice(list("a-1"), generator.integers(0, 4), replace=True).tolist()) for _ in range(2000)]
    names = list(unique_names(lambda: ids))
    assert len(set(names)) == len(ids)
    first = {id_: names[ids.index(id_)] for id_ in set(ids)}
    assert all(id_ == name for id_, name in first.items())
    assert all(name.startswith(id_) for id_, name in zip(ids, names, strict=True))


@pytest.mark.parametrize("name_of", [hdf5_name, file_name])
def test_an_unchanged_id_keeps_its_name(name_of: Callable[[str], str]) -> None:
    generator = np.random.default_rng(6)
    letters = list("a_/-1")
    ids = ["".join(generator.choice(letters, generator.integers(0, 4), replace=True).tolist()) for _ in range(2000)]
    ids += ["a/b", "a_b", "a/b-1", "a_b", "sp|P1|X", "P1", "P1-1", "tr|P1|Y", ".", UNNAMED, "x" * 300, "x" * NAME_BYTES]
    names = list(unique_names(lambda: ids, name_of))
    assert len(set(names)) == len(ids)
    assert all(names[ids.index(id_)] == id_ for id_ in set(ids) if name_of(id_) == id_)
    assert all(name.startswith(name_of(id_)) for id_, name in zip(ids, names, strict=True))


def test_file_names_fit_a_file_system(tmp_path: Path) -> None:
    for id_ in ("日" * 300, "a/b\x00c\n", "", ".", ".."):
        path = tmp_path / f"{file_name(id_)}-1000000.pt"
        path.touch()
        assert path.parent == tmp_path
        assert path.is_file()


MEMORY = """
import sys
from pathlib import Path
from seqmill.export.export import export_embeddings
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


@pytest.mark.parametrize(
    "format_name",
    ["npy", "h5ad", *(pytest.param(name, marks=pytest.mark.full) for name in ("parquet", "faiss", "csv"))],
)
def test_memory_is_bounded(format_name: str, large: Path, no_rows: Path) -> None:
    if format_name in ("parquet", "faiss"):
        pytest.importorskip({"parquet": "pyarrow", "faiss": "faiss"}[format_name])
    command = [sys.executable, "-c", MEMORY, large, no_rows, format_name]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    large.with_name(f"large.{format_name}").unlink()
    assert int(process.stdout) < 384 < open_embeddings(large).array.nbytes >> 20  # MB


OUTPUTS = [(6, "mean"), (6, "max"), (3, "mean"), (3, "max")]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 file with two layers, two poolings, and the vectors of residues by both layers."""
    folder = tmp_path_factory.mktemp("several")
    run = Run(folder, 1).build(write_fasta(folder / "f.faa", random_sequences([40, 7, 7, 30])))
    run.embed(outputs=Outputs((-1, 3), ("mean", "max"), "float16"))
    where = (run.embeddings, folder / "records.tsv.gz", folder / "manifest.json")
    merge_shards(run.index, run.shards, run.statuses, *where, dtype="float16")
    assert open_embeddings(run.embeddings).outputs == OUTPUTS
    return run.embeddings


@pytest.mark.parametrize(("layer", "pooling"), OUTPUTS)
def test_every_output_of_a_float16_file(layer: int, pooling: str, several: Path, tmp_path: Path) -> None:
    expected = open_embeddings(several, layer, pooling)
    assert expected.array.dtype == np.float16
    for format_name in ("npy", "h5", "pt", "h5ad", "csv"):
        export_embeddings(several, tmp_path / f"e.{format_name}", format_name, layer=layer, pooling=pooling)
    array = np.load(tmp_path / "e.npy")
    assert array.dtype == np.float16
    assert np.array_equal(array, expected.array)
    text = pandas.read_csv(tmp_path / "e.csv").iloc[:, 2:].to_numpy(np.float16)
    assert np.array_equal(text, expected.array)
    key = f"{pooling}_representations"
    with h5py.File(tmp_path / "e.h5") as h5, h5py.File(tmp_path / "e.h5ad") as h5ad:
        assert np.array_equal(h5ad["X"], expected.array)
        for row, name in enumerate(expected.ids):
            assert h5[name].dtype == np.float16
            assert np.array_equal(h5[name], expected.array[row])
            content = torch.load(tmp_path / f"e.pt/{name}.pt")
            assert content[key][layer].dtype == torch.float32
            assert np.array_equal(content[key][layer].numpy(), expected.array[row])
            assert np.array_equal(content["representations"][layer].numpy(), expected.residues(row))


def test_residues_of_every_layer(several: Path, tmp_path: Path) -> None:
    for layer in (6, 3):
        expected = open_embeddings(several, layer)
        export_embeddings(several, tmp_path / "residues.h5", "h5_residues", layer=layer)
        with h5py.File(tmp_path / "residues.h5") as file:
            assert all(np.array_equal(file[name], expected.residues(name)) for name in expected.ids)


def test_the_program_chooses_an_output(several: Path, tmp_path: Path) -> None:
    arguments = ("--embeddings", several, "--format", "npy", "--output", tmp_path / "e.npy")
    done = run_script("export.py", *arguments)
    assert "(layer 6, mean) as npy" in done.stderr
    assert "has several outputs (6 mean, 6 max, 3 mean, 3 max): --layer and --pooling choose" in done.stderr
    done = run_script("export.py", *arguments, "--layer", "-4", "--pooling", "max")
    assert done.returncode == 0, done.stderr
    assert "(layer 3, max) as npy" in done.stderr
    assert "several outputs" not in done.stderr
    assert np.array_equal(np.load(tmp_path / "e.npy"), open_embeddings(several, 3, "max").array)
    done = run_script("export.py", *arguments, "--layer", 2)
    assert done.returncode == 1
    assert "has no such output; there is layer 6 pooled by mean, layer 6 pooled by max" in done.stderr


@pytest.mark.parametrize(("model", "second"), [(MODEL, "6"), ("own.pt", "-1")])
def test_the_workflow_exports_every_output(model: str, second: str, tmp_path: Path) -> None:
    """A layer has its requested name if the model is a file, because Snakemake can't count the file's layers."""
    fasta = write_fasta(tmp_path / "some.faa", ["MKV"])
    (tmp_path / "own.pt").touch()
    settings = ("layers=[3,-1]", "pooling=[max,mean_tokens]", "exports=[npy,pt,h5_residues]", "per_residue=float16")
    command = [Path(sys.executable).parent / "snakemake", "--snakefile", REPOSITORY / "Snakefile", "--cores", "1"]
    command += ["--directory", tmp_path, "--dry-run", "--printshellcmds"]
    command += ["--config", f"fasta={fasta}", f"model={model}", *settings]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"--format (\w+) (.*?) ?--output \S+/exports/(\S+)", done.stdout + done.stderr)
    expected = [("h5_residues", "", "residues.h5"), ("h5_residues", f"--layer {second}", f"residues_{second}.h5")]
    for layer, pooling in ((3, "mean_tokens"), (second, "max"), (second, "mean_tokens")):
        options, name = f"--layer {layer} --pooling {pooling}", f"embeddings_{layer}_{pooling}"
        expected += [("npy", options, f"{name}.npy"), ("pt", options, f"{name}_pt")]
    expected += [("npy", "", "embeddings.npy"), ("pt", "", "embeddings_pt")]
    assert sorted(set(found)) == sorted(expected)


def test_formats_have_the_same_names_everywhere() -> None:
    schema = yaml.safe_load((REPOSITORY / "config/schemas/config.schema.yaml").read_text())
    one, several = schema["properties"]["exports"]["anyOf"]
    assert one["enum"] == several["items"]["enum"] == list(FORMATS)


def test_pt_with_a_long_header(tmp_path: Path) -> None:
    header = f"a {'description ' * 20_000}".strip()
    path = write_embeddings(tmp_path / "e.h5", np.ones((1, 3)), ["a"])
    with gzip.open(tmp_path / "records.tsv.gz", "wt") as file:
        file.write(f"record\tid\trow\tdescription\n1\ta\t0\t{header[2:]}\n")
    export_embeddings(path, tmp_path / "pt", "pt", tmp_path / "records.tsv.gz")
    assert torch.load(tmp_path / "pt/a.pt")["label"] == header


def test_the_program(run: Run, embeddings: Embeddings, tmp_path: Path) -> None:
    assert f"{{{','.join(FORMATS)}}}" in run_script("export.py", "--help").stdout
    arguments = ("--embeddings", run.embeddings, "--format", "npy", "--output", tmp_path / "new/e.npy")
    process = run_script("export.py", *arguments)
    assert process.returncode == 0, process.stderr
    assert "UNTRAINED WEIGHTS" in process.stderr
    assert np.array_equal(np.load(tmp_path / "new/e.npy"), embeddings.array)
    process = run_script("export.py", "--embeddings", tmp_path / "no.h5", *arguments[2:])
    assert process.returncode == 1
    assert "no such embeddings file" in process.stderr
    assert "Traceback" not in process.stderr


def ids_of_headers() -> list[str]:
    return [header.partition(" ")[0] for header in HEADERS]


def ids_beside(path: Path) -> list[str]:
    with path.with_name(f"{path.name}.ids.txt").open(encoding="utf-8") as file:
        return [line.removesuffix("\n") for line in file]


def names_in(path: Path) -> dict[str, tuple[str, int]]:
    """Return the id and row of each name, after checking that names are unique."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [(row["name"], (row["id"], int(row["row"]))) for row in csv.DictReader(file, delimiter="\t")]
    assert len(dict(rows)) == len(rows)
    return dict(rows)
