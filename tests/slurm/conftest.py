"""One cluster for all tests, and a local run; every run on the cluster must give the same bits."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cluster import Cluster, what_is_missing
from cluster_workflow import Workflow, digest_of

from pipeline import Run
from sequences import random_sequences


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = what_is_missing()
    if missing:
        pytest.skip(missing)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 10,000 tokens in 10 packs, two or three for each of the four workers."""
    lengths = np.random.default_rng(3).integers(20, 240, 75).tolist()
    path = tmp_path_factory.mktemp("fasta") / "proteins.faa"
    path.write_text("".join(f">id{n}\n{s}\n" for n, s in enumerate(random_sequences(lengths))))
    return path


@pytest.fixture(scope="session")
def local_digest(fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The SHA-256 of the embeddings from one worker without SLURM and Snakemake."""
    return digest_of(Run(tmp_path_factory.mktemp("local"), 1).build(fasta).embed().merge().embeddings)


@pytest.fixture
def workflow(cluster: Cluster, fasta: Path, tmp_path: Path) -> Iterator[Workflow]:
    """The workflow with four shards; all its processes are killed afterwards."""
    workflow = Workflow(cluster, tmp_path / "work", fasta)
    yield workflow
    workflow.kill()
    cluster.cancel_all()
    workflow.kill_left()
