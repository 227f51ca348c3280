"""What jobs ask a cluster for grows with the model, the tokens and the attempt; orphans are known by their run."""

import gzip
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

from pipeline import CONTIGS_DEMO, DEMO, MODEL, SCRIPTS, Run
from seqmill.errors import SeqmillError
from seqmill.index.build import build_index
from seqmill.model.weights import parameter_shapes
from seqmill.run.resources import BASE_MB, memory_mb, rewriting_minutes, runtime_minutes, tokens_in, tokens_of
from seqmill.run.slurm_jobs import cancel_orphans, claim_folder, stop_orphans
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import DNABERT_S, ESM2, NAMES, UNTRAINED_TOKENIZER, ModelSource, find_model
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
    # 270 MB were measured for 4,000 tokens on one thread in float32 (docs/performance.md).
    assert beyond[0] >= 150
    assert beyond[1] >= 270
    assert beyond[2] == pytest.approx(8 * beyond[1], abs=8)
    assert beyond[3] == pytest.approx(25 * beyond[1], abs=25)


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
    assert minutes() < minutes(num_tokens=2 * 10**8)
    assert minutes() < minutes(max_tokens=4096)
    assert minutes() < minutes(precision="float32")
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
    fewest = rewriting_minutes(files, 1)
    for file in files:
        with file.open("wb") as handle:
            os.truncate(handle.fileno(), 36 * 10**9)
    assert rewriting_minutes(files, 1) >= fewest + 30  # 40 MB/s
    assert rewriting_minutes(files, 2) == 2 * rewriting_minutes(files, 1)


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


SQUEUE = """#!/bin/sh
case "$*" in *--name=aaaa-1,bbbb-2*) ;; *) exit 2;; esac
if test -e {folder}/deaf; then rm {folder}/deaf; echo 'Socket timed out' >&2; exit 1; fi
test -e {folder}/cancelled && test ! -e {folder}/stuck && exit 0
echo 8; echo 8; echo 9
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the logs of two runs, and stand-ins for SLURM's commands; the real ones are in tests/slurm."""
    logs = tmp_path / ".snakemake/log"
    logs.mkdir(parents=True)
    for number, run in enumerate(("aaaa-1", "bbbb-2")):
        (logs / f"{number}.snakemake.log").write_text(f"Building DAG of jobs...\nSLURM run ID: {run}\nUsing shell\n")
    (logs / "local.snakemake.log").write_text("Building DAG of jobs...\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "squeue").write_text(SQUEUE.format(folder=tmp_path))
    (programs / "scancel").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/cancelled\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_only_jobs_of_runs_in_this_folder_are_cancelled(folder: Path) -> None:
    assert cancel_orphans(folder) == ["8", "9"]
    assert (folder / "cancelled").read_text() == "8 9\n"
    assert cancel_orphans(folder) == []


def test_a_run_cancels_orphans_only_if_no_other_run_is_alive(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with claim_folder(folder)[0], stop_orphans(folder):
        assert not (folder / "cancelled").exists()
    with stop_orphans(folder):
        assert (folder / "cancelled").read_text() == "8 9\n"
        assert not claim_folder(folder)[1]
    assert capsys.readouterr().err == "Cancelled SLURM jobs of an earlier run in this folder: 8 9\n"


def test_a_squeue_that_fails_is_asked_again(folder: Path) -> None:
    (folder / "deaf").touch()
    assert cancel_orphans(folder) == ["8", "9"]


def test_a_copy_of_a_folder_leaves_the_jobs_of_the_original_alone(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    claim_folder(folder)[0].close()
    copy = tmp_path_factory.mktemp("copy") / "of it"
    shutil.copytree(folder, copy)
    claim_folder(copy)[0].close()
    assert cancel_orphans(copy) == []
    assert not (folder / "cancelled").exists()
    assert cancel_orphans(folder) == ["8", "9"]


def test_a_second_run_in_the_folder_knows_of_the_first(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from seqmill.run.slurm_jobs import claim_folder\n"
    code += "file, alone = claim_folder(Path(sys.argv[1])); print(alone, flush=True); sys.stdin.read()"

    def run() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(tmp_path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(SCRIPTS)}, text=True, **pipes)

    first, second = run(), None
    assert first.stdout.readline() == "True\n"
    second = run()
    assert second.stdout.readline() == "False\n"
    first.kill()
    first.wait()
    third = run()
    assert third.stdout.readline() == "False\n"  # the second lives
    for process in (second, third):
        process.kill()
        process.wait()
    last = run()
    assert last.communicate("")[0] == "True\n"


def test_jobs_that_do_not_end_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "stuck").touch()
    monkeypatch.setattr("seqmill.run.slurm_jobs.WAIT_SECONDS", 0)
    with pytest.raises(SeqmillError, match="do not end: 8 9; wait"):
        cancel_orphans(folder)


def test_without_slurm_there_are_no_orphans(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert cancel_orphans(folder) == []
