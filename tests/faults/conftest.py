"""The undisturbed run that every other one must equal, bit for bit."""

from __future__ import annotations

import time

import numpy as np
import pytest
from workers import EACH_PACK, Undisturbed, digest_of, embed, status_of

from pipeline import Run
from sequences import random_sequences

WORLD_SIZE = 2


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    lengths = np.random.default_rng(3).integers(20, 240, 75).tolist()  # about 10,000 tokens in 10 packs
    fasta = folder / "proteins.faa"
    fasta.write_text("".join(f">id{n}\n{s}\n" for n, s in enumerate(random_sequences(lengths))))
    run = Run(folder, WORLD_SIZE).build(fasta)
    for rank in range(WORLD_SIZE):
        began = time.monotonic()
        done = embed(run, rank, *EACH_PACK)
        assert done.returncode == 0, done.stderr
        seconds = time.monotonic() - began
    run.merge()
    return Undisturbed(fasta, run.index, digest_of(run.embeddings), seconds, status_of(run, 1)["seconds"]["compute"])
