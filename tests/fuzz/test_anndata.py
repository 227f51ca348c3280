"""AnnData reads the exports. It needs its own environment, because it does not support the locked pandas."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from embeddings_file import write_embeddings
from seqmill import open_embeddings
from seqmill.export.export import export_embeddings

PACKAGES = ("anndata==0.12.19", "pandas==2.3.3")
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
