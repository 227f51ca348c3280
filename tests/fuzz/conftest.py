"""A folder in memory for the fuzz tests, which write tens of thousands of small files."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from families import dnabert_folder, random_contigs
from pipeline import MODEL, Run, run_script
from seqmill.spec.lengths import LengthPolicy
from sequences import random_sequences

SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="session")
def memory_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="seqmill-fuzz-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


WORLD_SIZE = 2


@pytest.fixture(scope="session")
def sound(memory_folder: Path) -> Run:
    """An index, two shards, and merged results, with duplicates, truncated records, descriptions, and several packs."""
    sequences = random_sequences([*range(300, 20, -12), 5, 1])
    return made(memory_folder / "sound", sequences, "MKV", MODEL, LengthPolicy("truncate", 250))


@pytest.fixture(scope="session")
def sound_contigs(memory_folder: Path) -> Run:
    """The same for nucleotides, with windows on both strands."""
    sequences = random_contigs([*range(900, 20, -40), 5, 1])
    policy = LengthPolicy("window", 400, 300, 200, "both")
    return made(memory_folder / "contigs", sequences, "ACN", str(dnabert_folder()), policy)


def made(folder: Path, sequences: list[str], short: str, model: str, policy: LengthPolicy) -> Run:
    folder.mkdir()
    records = [f">id{number} number {number}\n{sequence}\n" for number, sequence in enumerate(sequences)]
    fasta = folder / "some.fa"
    last = f">\n{short}\n>é 𝛼\n{short.lower()}\n"  # noqa: RUF001
    fasta.write_text("".join([*records, *records[3:6], last]), encoding="utf-8")
    run = Run(folder, WORLD_SIZE).build(fasta, model, policy)
    # In separate processes, because torch's threads do not survive the tests' forks.
    for rank, (shard, status) in enumerate(zip(run.shards, run.statuses, strict=True)):
        options = ["--index", run.index, "--rank", rank, "--world-size", WORLD_SIZE, "--output", shard]
        done = run_script(
            "embed_shard.py", *options, "--status", status, "--device=cpu", "--precision=float32", "--threads=1"
        )
        assert done.returncode == 0, done.stderr
    return run.merge()
