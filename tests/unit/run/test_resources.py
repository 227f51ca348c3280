"""What jobs ask a cluster for grows with the model, the tokens and the attempt."""

import gzip
import math
import os
import shutil
from pathlib import Path

import h5py
import pytest

from pipeline import CONTIGS_DEMO, DEMO, MODEL, Run
from seqmill.index.build import build_index
from seqmill.model.weights import parameter_shapes
from seqmill.run.resources import BASE_MB, memory_mb, rewriting_minutes, runtime_minutes, tokens_in, tokens_of
from seqmill.spec.families import DNABERT_S, ESM2
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import NAMES, UNTRAINED_TOKENIZER, ModelSource, find_model
from seqmill.store.index import open_index

SIZES = ((500, 1), (4000, 1), (4000, 8), (100_000, 1))  # tokens, threads


@pytest.mark.parametrize("name", NAMES)
def test_weights_fit_twice_in_float32(name: str) -> None:
    source = find_model(name)
    weights_mb = 4 * sum(map(math.prod, parameter_shapes(source.architecture).values())) / 1e6
    assert memory_mb(source, 1024, 0, 1) == math.ceil(BASE_MB + 2 * weights_mb)
    assert memory_mb(source, 1024, 0, 2) == pytest.approx(1.5 * memory_mb(source, 1024, 0, 1), abs=2)


def test_memory_grows_with_threads_and_the_longest_segment_on_a_cpu() -> None:
    source = find_model("dnabert_s")
    beyond = [memory_mb(source, longest, threads, 1) - memory_mb(source, longest, 0, 1) for longest, threads in SIZES]
    # 270 MB were measured for 4,000 tokens on one thread in float32 (docs/explanation/performance.md).
    assert beyond[0] >= 150
    assert beyond[1] >= 270
    assert beyond[2] == pytest.approx(8 * beyond[1], abs=8)
    assert beyond[3] == pytest.approx(25 * beyond[1], abs=25)


def test_memory_of_t5_follows_its_wide_queries(tmp_path: Path) -> None:
    """115 kB per token were measured in pieces of 2,048 tokens, with PyTorch's attention in float32."""
    (tmp_path / "config.json").write_text('{"model_type": "t5", "vocab_size": 128}')
    (tmp_path / "model.safetensors").touch()
    for name in ("prott5_xl_u50", "prostt5", str(tmp_path)):
        source = find_model(name)
        for longest, least in ((1000, 2 * 1.15 * 204.8), (12_001, 2 * 1.15 * 1200)):
            assert memory_mb(source, longest, 2, 1) - memory_mb(source, longest, 0, 1) >= least


def test_time_grows_with_everything_that_takes_time() -> None:
    def minutes(
        model: str = "esm2_t33_650M_UR50D",
        num_tokens: int = 10**8,
        max_tokens: int = 1024,
        precision: str = "auto",
        on_gpu: bool = True,
        threads: int = 8,
        attempt: int = 1,
    ) -> int:
        return runtime_minutes(find_model(model), num_tokens, max_tokens, precision, on_gpu, threads, attempt)

    assert minutes() < minutes(model="esm2_t36_3B_UR50D")
    assert minutes(model="esm2_t12_35M_UR50D") < minutes(model="dnabert_s") < minutes()
    assert minutes(model="esmc_300m") < minutes() < minutes(model="prott5_xl_u50") < minutes(model="esmc_6b")
    assert minutes() < minutes(num_tokens=2 * 10**8)
    assert minutes() < minutes(max_tokens=4096)
    assert minutes() == minutes(precision="float8") < minutes(precision="float32")
    assert minutes() < minutes(on_gpu=False)
    assert minutes(on_gpu=False, threads=16) < minutes(on_gpu=False)
    assert minutes(attempt=2) == 2 * minutes()
    assert 0 < minutes(num_tokens=0) < minutes()


def test_tokens_are_those_of_the_index_or_at_least_those_of_the_fasta(tmp_path: Path) -> None:
    run = Run(tmp_path, 1)
    before = tokens_in(run.index, DEMO, ESM2, 1)
    compressed = tmp_path / "demo.faa.gz"
    compressed.write_bytes(gzip.compress(DEMO.read_bytes()))
    run.build(DEMO)
    tokens = tokens_in(run.index, DEMO, ESM2, 1)
    assert tokens == 20676  # 20,518 residues, and two more of each of 79 sequences
    assert before >= tokens
    assert tokens_in(tmp_path / "none.h5", compressed, ESM2, 1) >= tokens
    assert tokens_in(tmp_path / "none.h5", tmp_path / "none.faa", ESM2, 1) == 0
    run.index.write_bytes(b"no HDF5")
    assert tokens_in(run.index, DEMO, ESM2, 1) == before
    run.index.unlink()
    run.build(DEMO)
    assert tokens_in(run.index, DEMO, ESM2, 1) == tokens


@pytest.mark.parametrize(
    ("policy", "copies"), [(LengthPolicy("full", 0), 1), (LengthPolicy("window", 600, 500, 250, "both"), 4)], ids=str
)
def test_tokens_of_contigs_are_reckoned_with_before_they_are_known(
    tmp_path: Path, policy: LengthPolicy, copies: int
) -> None:
    """As few as real contigs have, and not many more."""
    compressed = tmp_path / "contigs.fna.gz"
    compressed.write_bytes(gzip.compress(CONTIGS_DEMO.read_bytes()))
    index = tmp_path / "index.h5"
    before = [tokens_in(index, fasta, DNABERT_S, copies) for fasta in (CONTIGS_DEMO, compressed)]
    build_index(CONTIGS_DEMO, index, "untrained:dnabert_s", policy)
    tokens = tokens_in(index, CONTIGS_DEMO, DNABERT_S, copies)
    assert all(tokens < number < 2 * tokens for number in before)
    with h5py.File(index) as file:
        assert tokens == len(file["tokens"])
        longest = int(file["record_lengths"][:].max())
    if not policy.window:
        assert open_index(index).max_tokens <= tokens_of(DNABERT_S, longest)


def test_a_merge_of_more_bytes_is_given_more_time(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.h5", "b.h5")]
    fewest = rewriting_minutes(files)
    for file in files:
        with file.open("wb") as handle:
            os.truncate(handle.fileno(), 36 * 10**9)
    assert rewriting_minutes(files) >= fewest + 30  # 40 MB/s


def test_tokens_of_a_length() -> None:
    assert tokens_of(ESM2, 1022) == 1024
    assert tokens_of(DNABERT_S, 10_000) == 2502
    assert tokens_of(DNABERT_S, 1) == 3


def test_weights_of_unknown_size_are_judged_by_their_files(tmp_path: Path) -> None:
    path = tmp_path / "own.pt"
    with path.open("wb") as file:
        file.truncate(2_600_000_000)  # 650 million in float32
    own, known = ModelSource("own.pt", "checkpoint", None, path), find_model("esm2_t33_650M_UR50D")
    assert memory_mb(own, 1024, 0, 1) >= memory_mb(known, 1024, 0, 1)
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "own.pth").hardlink_to(path)
    assert memory_mb(find_model(str(tmp_path / "own.pth")), 1024, 0, 1) == memory_mb(own, 1024, 0, 1)
    path.rename(folder / "model.safetensors")
    assert memory_mb(ModelSource("folder", "folder", None, folder), 1024, 0, 1) == memory_mb(
        ModelSource("own.pt", "checkpoint", None, folder / "model.safetensors"), 1024, 0, 1
    )
    assert memory_mb(find_model(MODEL), 1024, 0, 1) < memory_mb(known, 1024, 0, 1)


def test_a_folder_of_nucleotides_is_judged_by_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "alibi_starting_size": 512}')
    shutil.copy(UNTRAINED_TOKENIZER, tmp_path)
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        file.truncate(470_000_000)  # 117 million in float32
    assert memory_mb(find_model(str(tmp_path)), 1024, 0, 1) == math.ceil(BASE_MB + 2 * 4 * 470 / 2)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model.safetensors")
    assert memory_mb(find_model(str(tmp_path)), 1024, 0, 1) == math.ceil(BASE_MB + 2 * 4 * 470 / 2)
