"""The forecast: its counts and bytes match a real run; the times of both are printed."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from fake_gpus import COMPUTE_ON_CPU
from families import WINDOWS
from pipeline import CONTIGS_DEMO, DEMO, MODEL, SCRIPTS, Run, run_script, save_parts
from seqmill.embedding.device import choose_precision
from seqmill.embedding.embedder import PackEmbedder
from seqmill.embedding.job import model_of
from seqmill.embedding.readout import Vectors
from seqmill.embedding.runner import CPU_PIECE_TOKENS
from seqmill.errors import SeqmillError
from seqmill.merge.merge import merge_shards
from seqmill.model.attention import choose_kernel
from seqmill.model.kernels import compiled
from seqmill.model.pack import Pack
from seqmill.model.weights import open_weights
from seqmill.run.calibration import Calibration, calibrate, sample_order, sample_packs
from seqmill.run.forecast import Shares, describe_shares, disk_needed, share_work
from seqmill.spec.architectures import model_flop
from seqmill.spec.fingerprint import Fingerprint
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import MODELS, find_model
from seqmill.spec.outputs import Outputs
from seqmill.spec.task import ComputeSettings
from seqmill.store.index import Index, open_index, residue_counts
from seqmill.store.part_file import PackResult
from seqmill.store.status import read_status
from sequences import random_sequences

ARCHITECTURE = MODELS["esm2_t6_8M_UR50D"]
ON_CPU = ComputeSettings(device="cpu", precision="float32")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """400 records: 30 duplicates and 2 rejected; three shards, merged."""
    folder = tmp_path_factory.mktemp("run")
    lengths = np.random.default_rng(5).integers(5, 80, 368).tolist()
    sequences = random_sequences([*lengths, 400, 500])
    sequences += sequences[:30]
    records = [f">sp|Q{number:05d}|PROTEIN_{number} words of {number}\n{s}\n" for number, s in enumerate(sequences)]
    (folder / "some.faa").write_text("".join(records))
    return Run(folder, 3).build(folder / "some.faa", policy=LengthPolicy("reject", 300)).embed().merge()


@pytest.fixture(scope="module")
def index(run: Run) -> Index:
    return open_index(run.index)


@pytest.fixture(scope="module")
def contigs(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Contigs in windows on both strands: several segments per sequence."""
    folder = tmp_path_factory.mktemp("contigs")
    return open_index(Run(folder, 1).build(CONTIGS_DEMO, WINDOWS.model, WINDOWS.policy).index)


def test_the_work_of_every_shard_is_what_a_worker_reports(run: Run, index: Index) -> None:
    shares = share_work(index, 3, ARCHITECTURE)
    statuses = [read_status(path) for path in run.statuses]
    assert shares.packs.tolist() == [status.num_packs for status in statuses]
    assert shares.tokens.tolist() == [status.run.num_tokens for status in statuses]
    for flop, status in zip(shares.flop, statuses, strict=True):
        seconds = status.run.num_tokens / status.run.tokens_per_second
        assert flop == pytest.approx(status.run.model_flops_per_second * seconds, rel=1e-4)
    assert shares.balance == max(shares.tokens) / (sum(shares.tokens) / 3)
    assert shares.longest_flop.max() == model_flop(ARCHITECTURE, np.array([index.max_tokens]))


@pytest.mark.parametrize("which", ["index", "contigs"])
def test_no_work_is_lost_between_shards(which: str, request: pytest.FixtureRequest) -> None:
    index = request.getfixturevalue(which)
    whole = share_work(index, 1, ARCHITECTURE)
    for world_size in (2, 5, index.num_packs, index.num_packs + 3):
        shares = share_work(index, world_size, ARCHITECTURE)
        assert shares.packs.sum() == index.num_packs
        assert shares.tokens.sum() == index.attributes["num_tokens"]
        assert shares.flop.sum() == pytest.approx(whole.flop[0])
        assert shares.longest_flop.max() == whole.longest_flop[0]
    assert "3 shards have no work" in describe_shares(shares)[-1]


def test_long_sequences_cost_more_per_token(index: Index) -> None:
    """The first packs have the longest sequences; the cost of attention grows with the square of their length."""
    shares = share_work(index, index.num_packs, ARCHITECTURE)
    a_token = shares.flop / shares.tokens
    assert (np.diff(a_token) < 0).all()


def test_files_have_the_expected_size(run: Run, index: Index) -> None:
    disk = disk_needed(index, 3, ARCHITECTURE.hidden_dim)
    merged = [run.embeddings, run.embeddings.with_name("records.tsv.gz")]
    assert disk.index == run.index.stat().st_size
    assert disk.shards == pytest.approx(sum(path.stat().st_size for path in run.shards), rel=0.03)
    assert disk.merged == pytest.approx(sum(path.stat().st_size for path in merged), rel=0.03)
    assert disk.most == disk.index + disk.shards + max(disk.parts, disk.merged)


@pytest.mark.parametrize("outputs", [Outputs((6,)), Outputs((2, 6), ("mean", "max"), "float16")])
def test_parts_have_the_expected_size(tmp_path: Path, run: Run, index: Index, outputs: Outputs) -> None:
    dim = ARCHITECTURE.hidden_dim
    fingerprint = Fingerprint.from_attributes(read_status(run.statuses[0]).fingerprint)
    fingerprint = replace(fingerprint, per_residue=outputs.per_residue)
    none, results = np.empty(0, np.int64), []
    for pack in range(index.num_packs):
        rows = np.arange(*index.pack_offsets[pack : pack + 2])
        vectors = np.zeros((len(rows), len(outputs.pairs) * dim), np.float32)
        number = int(residue_counts(index, rows).sum()) if outputs.per_residue else 0
        residues = np.zeros((number, len(outputs.layers) * dim), outputs.per_residue or "float16")
        results.append(PackResult(pack, rows, vectors, none, residues))
    save_parts(tmp_path, index, fingerprint, results, "shard_0-of-1.h5", math.inf)
    (part,) = tmp_path.iterdir()
    assert disk_needed(index, 1, dim, outputs).parts == pytest.approx(part.stat().st_size, rel=0.03)


@pytest.mark.parametrize(
    ("outputs", "dtype"),
    [
        (Outputs((2, 6), ("mean", "max")), "float16"),
        (Outputs((2, 6), per_residue="float32"), "float32"),
        (Outputs(per_residue="float16"), "float16"),
    ],
)
def test_files_of_several_outputs_have_the_expected_size(tmp_path: Path, outputs: Outputs, dtype: str) -> None:
    """Some records are duplicate, rejected or truncated; each unique sequence's residues are stored once."""
    sequences = random_sequences([*range(20, 100), 400])
    records = [f">Q{number:05d} words\n{s}\n" for number, s in enumerate([*sequences, *sequences[:40]])]
    (tmp_path / "some.faa").write_text("".join(records))
    run = Run(tmp_path, 2).build(tmp_path / "some.faa", policy=LengthPolicy("truncate", 90)).embed(outputs=outputs)
    table = tmp_path / "records.tsv.gz"
    merge_shards(run.index, run.shards, run.statuses, run.embeddings, table, tmp_path / "manifest.json", dtype)
    disk = disk_needed(open_index(run.index), 2, ARCHITECTURE.hidden_dim, outputs, dtype)
    assert disk.shards == pytest.approx(sum(path.stat().st_size for path in run.shards), rel=0.03)
    assert disk.merged == pytest.approx(run.embeddings.stat().st_size + table.stat().st_size, rel=0.03)


def test_a_large_table_size_is_estimated_from_a_block(run: Run, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = disk_needed(index, 3, ARCHITECTURE.hidden_dim).merged
    monkeypatch.setattr("seqmill.run.forecast.SAMPLED_RECORDS", 150)
    table = run.embeddings.with_name("records.tsv.gz").stat().st_size
    assert disk_needed(index, 3, ARCHITECTURE.hidden_dim).merged - whole == pytest.approx(0, abs=0.25 * table)


@pytest.mark.parametrize("number", [1, 2, 3, 64, 1000])
def test_any_first_few_samples_are_evenly_spread(number: int) -> None:
    order = list(sample_order(number))
    assert sorted(order) == list(range(number))
    assert order == list(sample_order(number))
    for first in (8, 16, 32):
        if number >= 2 * first:
            gaps = np.diff(sorted([*islice(sample_order(number), first), number]))
            assert gaps.max() <= 3 * number / first


@pytest.mark.parametrize("which", ["index", "contigs"])
@pytest.mark.parametrize("limit", [1, 500, 10**9])
def test_samples_are_the_first_sequences_of_packs(which: str, limit: int, request: pytest.FixtureRequest) -> None:
    index = request.getfixturevalue(which)
    sample, order = sample_packs(index, 10, limit)
    assert len(order) == 10
    for pack, number in zip(sample_order(index.num_packs), order, strict=False):
        lengths = sample.pack_lengths(number)
        assert lengths.tolist() == index.pack_lengths(pack)[: len(lengths)].tolist()
        assert bytes(sample.pack_tokens(number)) == bytes(index.pack_tokens(pack)[: lengths.sum()])
        fits = len(lengths) == len(index.pack_lengths(pack)) or lengths.sum() + lengths[-1] >= limit
        assert len(lengths) == 1 or lengths.sum() <= limit
        assert fits or limit == 1
    assert sample.num_packs == 2 * 10 - 1


@pytest.mark.full
def test_a_calibration_with_enough_time_computes_every_token_once(run: Run, index: Index) -> None:
    found = calibrate(index, find_model(MODEL), ON_CPU, 600.0)
    assert (found.packs, found.tokens) == (index.num_packs, index.attributes["num_tokens"])
    shares = share_work(index, 3, ARCHITECTURE)
    assert found.flops_per_second * found.seconds == pytest.approx(shares.flop.sum())
    real = sum(read_status(path).seconds["compute"] for path in run.statuses)
    print(f"expected {found.shard_seconds(shares).sum():.2f} s, a real run took {real:.2f} s")


def test_contigs_are_calibrated_by_their_windows(contigs: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes two samples, from the first pack and a middle one, in a time that is enough on any machine."""
    monkeypatch.setattr("seqmill.run.calibration.MOST_SAMPLES", 2)
    source = find_model(WINDOWS.model)
    found = calibrate(contigs, source, ON_CPU, 600.0)
    sample, order = sample_packs(contigs, 2, CPU_PIECE_TOKENS)
    assert (found.packs, found.tokens) == (2, sum(sample.pack_lengths(pack).sum() for pack in order))
    assert found.shard_seconds(share_work(contigs, 2, open_weights(source)[0])).min() > 0


def test_the_speed_is_guessed_if_no_pack_fits_the_time(index: Index) -> None:
    found = calibrate(index, find_model(MODEL), ON_CPU, 1e-6)
    assert (found.packs, found.tokens) == (0, 0)
    assert 0 < found.flops_per_second < math.inf


def test_a_shard_takes_at_least_the_time_of_its_longest_sequence_on_one_thread() -> None:
    shares = Shares(np.array([2, 2]), np.array([20, 20]), np.array([100.0, 100.0]), np.array([90.0, 10.0]))
    found = Calibration("", [], "", 1, 1, 1.0, flops_per_second=10.0, threads=4, load_seconds=0, peak={}, splits=0)
    assert found.shard_seconds(shares).tolist() == [36.0, 10.0]


def test_a_calibration_says_what_is_chosen_and_what_would_be_faster(index: Index) -> None:
    best = choose_kernel(torch.device("cpu"), torch.float32, ARCHITECTURE.head_dim)
    found = calibrate(index, find_model(MODEL), replace(ON_CPU, precision="float32", attention="sdpa"), 0.1)
    assert ", float32, attention sdpa, elementwise " in found.device
    native = choose_precision("auto", torch.device("cpu"))
    expected = [] if native == "float32" else [f"precision {native} instead of float32"]
    assert found.faster == expected + ([] if best == "sdpa" else [f"attention {best}"])
    assert calibrate(index, find_model(MODEL), ComputeSettings(device="cpu"), 0.1).faster == []


def test_a_calibration_without_a_compiler_says_how_to_be_faster(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = next((name for name in compiled.KERNELS if not compiled.missing_features(name)), None)
    if wanted is None or choose_precision("auto", torch.device("cpu")) != compiled.KERNELS[wanted].precision:
        pytest.skip("the processor has none of our kernels for its precision")
    for name, value in {"PATH": "", "CC": "none", "XDG_CACHE_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(compiled, "load", compiled.load.__wrapped__)
    (way,) = calibrate(index, find_model(MODEL), ComputeSettings(device="cpu"), 0.1).faster
    assert way.startswith(f"attention {wanted} (this installation has no compiled library for it")


def test_a_calibration_computes_the_outputs_of_a_worker(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers, poolings, and residues, because they cost memory and time."""
    seen = []
    real = PackEmbedder.__call__

    def look(self: PackEmbedder, pack: Pack) -> Vectors:
        seen.append(real(self, pack))
        return seen[-1]

    monkeypatch.setattr(PackEmbedder, "__call__", look)
    settings = replace(ON_CPU, outputs=Outputs((2, -1), ("mean", "max"), "float16"))
    calibrate(index, find_model(MODEL), settings, 0.2)
    assert {vectors.rows.shape[1] for vectors in seen} == {4 * ARCHITECTURE.hidden_dim}
    assert {vectors.residues.shape[1] for vectors in seen} == {2 * ARCHITECTURE.hidden_dim}


def test_untrained_weights_replace_a_model_that_is_not_fetched_yet(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = model_of(index, "esm2_t6_8M_UR50D")
    assert "untrained weights" in calibrate(index, source, ON_CPU, 0.01).weights
    assert calibrate(index, find_model(MODEL), ON_CPU, 0.01).weights == ""
    with pytest.raises(SeqmillError, match=r"index\.h5: made for untrained:esm2_t6_8M_UR50D, a model of ESM-2, and"):
        model_of(index, "untrained:dnabert_s")


def facts(text: str) -> dict[str, str]:
    return {line[:12].strip(): line[12:] for line in text.splitlines() if line[:1] != " "}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_the_plan_of_an_index(run: Run, index: Index) -> None:
    before = snapshot(run.folder)
    done = run_script("plan.py", "--index", run.index, "--world-size", 3, "--device", "cpu", "--seconds", 0.5)
    assert (done.returncode, done.stderr) == (0, "")
    found = facts(done.stdout)
    counts = run.manifest["counts"]
    assert (found["fasta"], found["model"]) == (str(run.folder / "some.faa"), MODEL)
    assert found["records"] == "400: 368 embedded, 30 duplicate, 2 rejected"
    assert found["unique"] == f"368 sequences, {counts['num_tokens']:,} tokens"
    assert found["longest"].startswith(f"{index.max_tokens} tokens: 'sp|Q")
    assert found["packs"].startswith(f"{counts['num_packs']}, of at most 1,024 tokens")
    assert found["balance"].startswith(f"{share_work(index, 3, ARCHITECTURE).balance:.2f},")
    assert {"device", "speed", "time", "memory", "disk"} < found.keys()
    assert f"free on the disk of {run.folder}" in done.stdout
    assert snapshot(run.folder) == before


def test_a_plan_leases_a_gpu_as_workers_do(run: Run) -> None:
    """The devices are fake."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "5,6", "PYTHONPATH": COMPUTE_ON_CPU}
    done = run_script("plan.py", "--index", run.index, "--seconds", 0.1, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"INFO GPU [56] of 5, 6\n", done.stderr)


def test_the_plan_of_a_fasta_leaves_no_files(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    options = {"cwd": tmp_path / "here", "env": {**os.environ, "TMPDIR": str(tmp_path / "temporary")}}
    done = run_script("plan.py", "--fasta", DEMO, "--model", MODEL, "--seconds", 0, "--max-length", 500, **options)
    assert done.returncode == 0, done.stderr
    found = facts(done.stdout)
    assert re.fullmatch(r"85: \d+ embedded, \d+ truncated, 6 duplicate", found["records"])
    assert found["longest"].startswith("502 tokens: ")
    assert "time" not in found  # without a calibration
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "here", tmp_path / "temporary"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_plan_leaves_no_files(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, SCRIPTS / "plan.py", "--fasta", CONTIGS_DEMO, "--model", "untrained:dnabert_s"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([*command, "--seconds", "60"], env=environment, stderr=subprocess.PIPE) as plan:
        while not list(tmp_path.glob("seqmill-plan-*/index.h5")):
            assert plan.poll() is None
            time.sleep(0.02)
        plan.send_signal(number)
        assert b"Traceback" not in plan.stderr.read()
        assert plan.wait(60) == 128 + number
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--index", "none.h5"], "none.h5: no such index"),
        (["--fasta", "none.faa", "--model", MODEL], "none.faa"),
        (["--fasta", DEMO, "--model", "esm3"], "model 'esm3' is not known"),
        (["--fasta", DEMO], "--fasta needs --model"),
        (["--fasta", DEMO, "--model", MODEL, "--max-length", "0"], "--max-length: 0 is below 1"),
        (["--fasta", DEMO, "--model", "untrained:dnabert_s"], "this looks like proteins"),
        (["--fasta", DEMO, "--model", MODEL, "--layers", "7"], "layer 7: the model has layers 0 to 6"),
    ],
)
def test_input_that_cannot_be_planned_is_named(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = run_script("plan.py", *arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_damaged_index_is_named(tmp_path: Path, run: Run) -> None:
    (tmp_path / "index.h5").write_bytes(run.index.read_bytes()[:-5000])
    done = run_script("plan.py", "--index", tmp_path / "index.h5")
    assert done.returncode == 1
    assert str(tmp_path / "index.h5") in done.stderr
    assert "Traceback" not in done.stderr
