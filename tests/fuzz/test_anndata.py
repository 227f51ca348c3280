"""AnnData reads the exports, and `to_anndata` makes the same. It needs an environment with an older pandas."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from embeddings_file import write_embeddings
from pipeline import SCRIPTS
from seqmill import open_embeddings
from seqmill.export.export import export_embeddings

PACKAGES = ("anndata==0.12.19", "pandas==2.3.3", "msgspec")
IDS = ["a", "a", "a", "a-1", "", "", "NA", "é日本|x", "line\u2028separator", 'quote"and,comma']

# Saves what AnnData reads, so that the test can compare it.
READ = """
import sys
import anndata, numpy as np, pandas
path, again, found = sys.argv[1:]
data = anndata.read_h5ad(path)
ids = data.obs["id"].tolist()
theirs = anndata.AnnData(obs=pandas.DataFrame(index=ids))
theirs.obs_names_make_unique()
assert data.obs_names.tolist() == theirs.obs_names.tolist()
assert data.var_names.tolist() == [str(n) for n in range(data.n_vars)]
assert np.array_equal(anndata.read_h5ad(path, backed="r")[3:5].to_memory().X, data.X[3:5])
data.write_h5ad(again)
assert np.array_equal(anndata.read_h5ad(again).X, data.X)
assert dict(anndata.read_h5ad(again).uns) == dict(data.uns)
uns = np.array(sorted(map(str, data.uns.items())))
np.savez(found, X=data.X, ids=np.array(ids), lengths=data.obs["length"], uns=uns)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with AnnData; its tests are skipped if it can't be created."""
    folder = tmp_path_factory.mktemp("anndata")
    for command in (
        [sys.executable, "-m", "venv", folder],
        [folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES],
    ):
        made = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"an environment with AnnData needs the network: {made.stderr.strip()[-300:]}")
    return folder / "bin/python"


@pytest.mark.parametrize("rows", [len(IDS), 0])
def test_anndata_reads_an_export(python: Path, rows: int, tmp_path: Path) -> None:
    vectors = np.random.default_rng(7).standard_normal((rows, 32), np.float32)
    embeddings = open_embeddings(write_embeddings(tmp_path / "e.h5", vectors, IDS[:rows]))
    export_embeddings(embeddings.path, tmp_path / "e.h5ad", "h5ad")
    arguments = [tmp_path / "e.h5ad", tmp_path / "again.h5ad", tmp_path / "found.npz"]
    done = subprocess.run([python, "-W", "ignore", "-c", READ, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    assert found["X"].dtype == np.float32
    assert np.array_equal(found["X"], vectors)
    assert found["ids"].tolist() == embeddings.ids
    assert found["lengths"].tolist() == embeddings.lengths.tolist()
    assert found["uns"].tolist() == sorted(map(str, embeddings.attrs.items()))


CONVERT = """
import sys
import anndata, numpy as np
import seqmill
exported, made = anndata.read_h5ad(sys.argv[2]), seqmill.open_embeddings(sys.argv[1]).to_anndata()
assert made.X.dtype == np.float32
assert np.array_equal(made.X, exported.X)
assert made.obs.equals(exported.obs.astype(made.obs.dtypes.to_dict()))
assert made.obs_names.tolist() == exported.obs_names.tolist()
assert made.uns.keys() == exported.uns.keys()
assert all(made.uns[name] == exported.uns[name] for name in made.uns)
made.write_h5ad(sys.argv[3])
assert np.array_equal(anndata.read_h5ad(sys.argv[3]).X, exported.X)
"""


def test_a_conversion_is_the_same_as_the_export(python: Path, tmp_path: Path) -> None:
    vectors = np.random.default_rng(7).standard_normal((len(IDS), 32), np.float32)
    path = write_embeddings(tmp_path / "e.h5", vectors, IDS)
    export_embeddings(path, tmp_path / "e.h5ad", "h5ad")
    arguments = [python, "-W", "ignore", "-c", CONVERT, path, tmp_path / "e.h5ad", tmp_path / "made.h5ad"]
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(SCRIPTS)})
    assert done.returncode == 0, done.stderr
