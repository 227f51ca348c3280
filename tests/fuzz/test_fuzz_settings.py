"""Any settings and any table of datasets are accepted, or refused in lines that begin with `seqmill:`.

`read_datasets` gets tables of odd cells and of random bytes in this process. A dry run of the workflow gets odd values
of every key. Nothing gives a traceback.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import MODEL, REPOSITORY, Run
from seqmill.base.input_files import KnownDigests
from seqmill.errors import SeqmillError
from seqmill.run.datasets import dataset_of_file, read_datasets
from seqmill.run.stale import Request, stale_results
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import find_model
from seqmill.spec.outputs import Outputs

HEALTH = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
FIXED = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": HEALTH}
LONGEST_NAME = 255  # bytes, on Linux

ODD_CELLS = ["", " ", "~", "~nobody-here", "~\0", "a\0b", ".", "..", "../..", "/", "//", "a/b", "é", '"', '"a"', '"a']
ODD_CELLS += ["x" * 300, "x" * 5000, "/" + "d/" * 3000, "\ufeff", "\x85", "\u2028", "\x1c", "-", "{x}", "a b", "#a"]
ODD_CELLS += ["\ud800"]
CELLS = st.sampled_from(ODD_CELLS) | st.text(max_size=5)
FASTAS = (
    st.sampled_from(["good.fa", "good.fa", "good.fa", "bad.fa", "empty.fa", "folder", "cut.fa.gz", "no.fa"]) | CELLS
)
MODELS = st.sampled_from([MODEL, MODEL, "", "esm2_t33_650M_UR50D", "untrained:", "no.pt", "folder", "/no.pt"]) | CELLS
ROWS = st.tuples(st.sampled_from(["a", "b", "c"]) | CELLS, FASTAS, MODELS) | st.lists(CELLS, max_size=5).map(tuple)
HEADERS = st.sampled_from(
    ["dataset\tfasta\tmodel"] * 6 + ["dataset\tfasta", "", "\ufeffdataset\tfasta\tmodel\t\t", "a,b,c"]
)


@pytest.fixture(scope="session")
def folder(memory_folder: Path) -> Path:
    folder = memory_folder / "settings"
    folder.mkdir()
    (folder / "folder").mkdir()
    (folder / "good.fa").write_text(">a\nMKV\n")
    (folder / "bad.fa").write_bytes(b"\0\1\2")
    (folder / "empty.fa").write_text("")
    (folder / "cut.fa.gz").write_bytes(b"\x1f\x8b\x08")
    return folder


def check_message(error: SeqmillError, start: str) -> None:
    assert str(error).startswith(start)
    assert "\n" not in str(error)


def check_table_message(message: str, table: Path) -> None:
    """One line about the whole table, or one for each of its bad lines."""
    lines = message.split("\n")
    assert all(line.startswith(f"{table}: ") for line in lines)
    if lines[1:]:
        numbers = [int(line.removeprefix(f"{table}: line ").partition(":")[0]) for line in lines]
        assert numbers == sorted(set(numbers))


def read(folder: Path, stored: bytes) -> None:
    table = folder / "datasets.tsv"
    table.write_bytes(stored)
    try:
        datasets = read_datasets(table, MODEL, [folder])
    except SeqmillError as error:
        check_table_message(str(error), table)
        return
    assert datasets
    for dataset in datasets:
        assert dataset.fasta.is_file()
        assert dataset.fasta.read_bytes().startswith(b">")
        assert Path(dataset.name).name == dataset.name
        for name in (dataset.name, dataset.model.slug):
            assert name not in ("", ".", "..")
            assert len(name.encode()) <= LONGEST_NAME
    assert len({(dataset.name, dataset.model.slug) for dataset in datasets}) == len(datasets)


@given(HEADERS, st.lists(ROWS, max_size=4), st.sampled_from(["\n", "\r\n", "\n\n", "\n#\t\n"]))
@settings(max_examples=4000, **FIXED)
def test_tables_of_odd_cells(folder: Path, header: str, rows: list[tuple[str, ...]], newline: str) -> None:
    read(folder, newline.join([header, *map("\t".join, rows)]).encode("utf-8", "surrogatepass"))


@given(
    st.sampled_from([b"", b"dataset\tfasta\tmodel\n", b"dataset\tfasta\tmodel\na\tgood.fa\t"]), st.binary(max_size=60)
)
@settings(max_examples=1500, **FIXED)
def test_tables_of_random_bytes(folder: Path, start: bytes, rest: bytes) -> None:
    read(folder, start + rest)


@given(FASTAS, MODELS)
@settings(max_examples=1000, **FIXED)
def test_one_fasta(folder: Path, fasta: str, model: str) -> None:
    try:
        dataset = dataset_of_file(fasta, model, [folder])
    except SeqmillError:
        return
    assert dataset.fasta.is_file()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | CELLS,
    lambda inner: st.lists(inner) | st.dictionaries(CELLS, inner),
)


@pytest.fixture(scope="session")
def merged(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of good.fa."""
    run = Run(tmp_path_factory.mktemp("merged"), 1).build(folder / "good.fa").embed().merge()
    (run.folder / "manifest.json").rename(run.folder / "sound.json")
    return run.folder


@given(JSON, JSON, JSON, st.booleans())
@settings(max_examples=500, **FIXED)
def test_odd_manifests_of_earlier_results(
    folder: Path, merged: Path, fasta: object, model: object, weights: object, plausible: bool
) -> None:
    """The request is compared with an earlier run's manifest; a damaged manifest must not stop this run."""
    manifest = json.loads((merged / "sound.json").read_text())
    odd = manifest | {"fasta": {**manifest["fasta"], "stamp": fasta}, "weights": weights, "shards": [{"run": model}]}
    (merged / "manifest.json").write_text(json.dumps(odd if plausible else fasta))
    request = Request(folder / "good.fa", find_model(MODEL), LengthPolicy(), Outputs(), "float32")
    try:
        stale = stale_results(merged, request, [], KnownDigests(folder / "digests.json"))
    except SeqmillError as error:
        check_message(error, f"{merged} holds the results of ")
    else:
        assert set(stale) <= {merged / "embeddings.h5"}
        assert stale or plausible


CONFIG = [
    ("shards", value)
    for value in ("0", "-1", "1.5", "many", "[]", "{}", "null", "1e3", "1e999", "true", "", "10000000000")
]
CONFIG += [("max_length", value) for value in ("0", "1e400", "'7'", "0x10", "nan", "[1]", "-5")]
CONFIG += [("window", value) for value in ("0", "10", "1e400", "[1]", "x")]
CONFIG += [("stride", value) for value in ("0", "auto", "null", "1.5")]
CONFIG += [("strand", "reverse"), ("strand", "null"), ("pooling", "max"), ("pooling", "mean_tokens")]
CONFIG += [("long_sequences", value) for value in ("window", "full", "null")]
CONFIG += [("long_sequences", "drop"), ("device", "gpu"), ("precision", "float64"), ("precision", "null")]
CONFIG += [("model", value) for value in ("", "x" * 300, "~nobody-here", "7", "untrained:x", "../..", "{x}", "a\nb")]
CONFIG += [("fasta", value) for value in ("no.fa", "folder", "bad.fa", "x" * 5000, "7", "[a]", "~nobody-here/a")]
CONFIG += [("datasets", value) for value in ("", "no.tsv", "folder", "good.fa", "x" * 5000, "7")]
CONFIG += [("nonsense", "1"), ("shard", "2")]


@pytest.mark.parametrize(("key", "value"), CONFIG)
def test_odd_settings(folder: Path, key: str, value: str) -> None:
    given_ = {"fasta": "good.fa", "model": MODEL, "device": "cpu"}
    if key == "datasets":
        del given_["fasta"]
    given_[key] = value
    command = [sys.executable, "-m", "snakemake", "-n", "--cores=1", "--quiet", "--snakefile", REPOSITORY / "Snakefile"]
    command += ["--config", *(f"{name}={text}" for name, text in given_.items())]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    if done.returncode:
        assert any(line.startswith("seqmill: ") for line in said.splitlines()), said
