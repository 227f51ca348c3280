"""The undisturbed runs that every other run must equal, bit for bit: ESM-2, and the other families in windows."""

import time
from pathlib import Path

import numpy as np
import pytest
from workers import EACH_PACK, Undisturbed, digest_of, embed, status_of

import esmc_reference
import t5_reference
from families import dnabert_folder, random_contigs, write_fasta
from pipeline import MODEL, Run
from seqmill.spec.architectures import DnabertArchitecture, EsmcArchitecture, T5Architecture
from seqmill.spec.lengths import LengthPolicy
from sequences import random_sequences

WORLD_SIZE = 2
# As much work as the smallest ESM-2, so that there is time to disturb it.
MIDDLING = DnabertArchitecture(num_layers=4, hidden_dim=256, num_heads=8)
MIDDLING_ESMC = EsmcArchitecture(num_layers=4, hidden_dim=256, num_heads=4)
MIDDLING_T5 = T5Architecture(num_layers=4, hidden_dim=256, num_heads=4, feed_forward_dim=1024)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-faults", action="store_true", help="of test_every_system_call.py all faults, not a sample")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    lengths = np.random.default_rng(3).integers(20, 240, 75).tolist()  # about 10,000 tokens in 10 packs
    return run(tmp_path_factory.mktemp("undisturbed"), random_sequences(lengths), MODEL, LengthPolicy())


@pytest.fixture(scope="session")
def undisturbed_contigs(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    lengths = np.random.default_rng(4).integers(20, 500, 80).tolist()  # about 12,500 tokens in 14 packs
    policy = LengthPolicy("window", 250, 200, 150, "both")
    folder = tmp_path_factory.mktemp("undisturbed_contigs")
    return run(folder, random_contigs(lengths), str(dnabert_folder(MIDDLING, "middling")), policy)


@pytest.fixture(scope="session")
def undisturbed_esmc(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed_esmc")
    return run_in_windows(folder, esmc_reference.save_folder(folder / "model", MIDDLING_ESMC))


@pytest.fixture(scope="session")
def undisturbed_prott5(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed_prott5")
    return run_in_windows(folder, t5_reference.save_folder(folder / "model", MIDDLING_T5))


def run_in_windows(folder: Path, model: Path) -> Undisturbed:
    lengths = np.random.default_rng(3).integers(20, 240, 75).tolist()
    return run(folder, random_sequences(lengths), str(model), LengthPolicy("window", 150, 120, 80))


@pytest.fixture(scope="session", params=["contigs", "esmc", "prott5"])
def undisturbed_windows(request: pytest.FixtureRequest) -> Undisturbed:
    return request.getfixturevalue(f"undisturbed_{request.param}")


def run(folder: Path, sequences: list[str], model: str, policy: LengthPolicy) -> Undisturbed:
    fasta = write_fasta(folder / "some.fa", sequences)
    run = Run(folder, WORLD_SIZE).build(fasta, model, policy)
    for rank in range(WORLD_SIZE):
        began = time.monotonic()
        done = embed(run, rank, *EACH_PACK)
        assert done.returncode == 0, done.stderr
        seconds = time.monotonic() - began
    run.merge()
    compute_seconds = status_of(run, 1)["seconds"]["compute"]
    return Undisturbed(fasta, model, policy, run.index, digest_of(run.embeddings), seconds, compute_seconds)
