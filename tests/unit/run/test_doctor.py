"""The doctor on real, damaged results: its findings, its advice, and that it changes nothing."""

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline import MODEL, SCRIPTS, Run, run_script, save_parts
from seqmill.api.embeddings import open_embeddings
from seqmill.base.hdf5 import write_attributes
from seqmill.base.locks import lock_path_of
from seqmill.run.doctor import packs_in_words
from seqmill.spec.fingerprint import Fingerprint
from seqmill.store.index import open_index
from seqmill.store.part_file import PackResult
from seqmill.store.shards import open_shard
from sequences import random_sequences

NAME = "tiny/untrained-esm2_t6_8M_UR50D"


class Results(Run):
    """The workflow's layout: results in ROOT/results/tiny/MODEL, shards in their own subfolder."""

    @property
    def root(self) -> Path:
        return self.folder.parents[2]

    @property
    def shards(self) -> list[Path]:
        return [self.folder / f"shards/shard_{rank}-of-{self.world_size}.h5" for rank in range(self.world_size)]

    def copy(self, root: Path) -> "Results":
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        return Results(root / "results" / NAME, self.world_size)

    def log(self, name: str, text: str) -> None:
        path = self.root / "logs" / NAME / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> "Results":
    root = tmp_path_factory.mktemp("whole")
    sequences = random_sequences([400, 300, 600, 200, 500, 5])
    records = [f">p{number}\n{sequence}\n" for number, sequence in enumerate([*sequences, sequences[0]])]
    (root / "tiny.faa").write_text("".join(records))
    (root / "results" / NAME).mkdir(parents=True)
    (root / ".snakemake").mkdir()  # made by the workflow
    return Results(root / "results" / NAME, 2).build(root / "tiny.faa").embed().merge()


@pytest.fixture
def results(whole: Results, tmp_path: Path) -> "Results":
    return whole.copy(tmp_path)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


def doctor(results: Results, *arguments: object, code: int = 1) -> str:
    """Return the doctor's output in the results' working directory; its exit code must be `code`."""
    before = snapshot(results.root)
    done = run_script("doctor.py", *arguments, cwd=results.root)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr == ""
    assert snapshot(results.root) == before
    assert done.stdout.splitlines()[-1].startswith("next: ")
    subprocess.run(["bash", "-n", "-c", advice(done.stdout)], check=True)
    return done.stdout


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit_status(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_invalid_records_are_named(tmp_path: Path) -> None:
    (tmp_path / "tiny.faa").write_text(">a\nMKV\n>b\nM-K\n>c\n\n")
    results = Results(tmp_path / "results" / NAME, 1)
    results.folder.mkdir(parents=True)
    results.build(tmp_path / "tiny.faa", on_invalid="skip").embed().merge()
    said = doctor(results, code=0)
    assert "embeddings.h5: 1 x 320; 1 embedded, 2 rejected" in said
    assert "INVALID: 2 records left out, with a letter that is not allowed or without a sequence; see records" in said


def advice(said: str) -> str:
    return said.splitlines()[-1].removeprefix("next: ")


@pytest.mark.parametrize("folder", ["results", "results/tiny", f"results/{NAME}", "", "."])
def test_a_healthy_folder_needs_nothing(results: Results, folder: str) -> None:
    said = doctor(results, *([folder] if folder else []), code=0)
    assert f"{NAME}: complete\n" in said
    assert "index: 7 records, 6 sequences" in said
    assert "shards: 2 of 2 complete" in said
    assert "7 x 320; 6 embedded, 1 duplicate" in said
    assert "audit: no sequence was recomputed: it is off" in said
    assert "UNTRAINED WEIGHTS" in said
    assert advice(said) == "nothing to do"
    assert len(said.splitlines()) == 7
    assert "every digest is right" in doctor(results, "--check", code=0)


def test_it_starts_without_torch() -> None:
    code = "import sys; import seqmill.run.doctor; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SCRIPTS)}, check=True)


def test_a_missing_shard(results: Results) -> None:
    results.shards[1].unlink()
    said = doctor(results)
    assert "shard_1-of-2: complete by its status JSON, but the file is missing" in said
    assert "shards: 1 of 2 complete" in said
    assert "snakemake --cores all" in advice(said)
    results.statuses[1].unlink()
    assert "shard_1-of-2: never started" in doctor(results)


def test_merged_results_need_no_shards_and_no_index(results: Results) -> None:
    """docs/reference/output-format.md says that both may be deleted after the merge."""
    for path in results.shards:
        path.unlink()
    assert "shards: none; the merged results do not need them" in doctor(results, code=0)
    shutil.rmtree(results.folder / "shards")
    results.index.unlink()
    assert "index: none; the merged results do not need it" in doctor(results, "--check", code=0)


@pytest.mark.parametrize(
    ("kind", "message", "step"),
    [
        ("SeqmillError", "model.pt: cannot be loaded", "first: fix what the error says\n"),
        ("OSError", "[Errno 28] No space left on device: 's.h5'", "first: free disk space, "),
        ("SeqmillError", "1 sequence has no finite embedding: 'x'", ", or set on_error: skip"),
        ("SeqmillError", "index.h5: tokens are damaged; build the index again", "next: rm "),
        ("Interrupted", "stopped by SIGTERM", "next: snakemake --cores all"),
    ],
)
def test_a_failed_shard_is_reported_with_its_error(results: Results, kind: str, message: str, step: str) -> None:
    results.shards[0].unlink()
    edit_status(results.statuses[0], status="failed", attempt=3, error={"type": kind, "message": message})
    results.log("embed_shard_0-of-2", "10:00:00 ERROR it failed\n")
    said = doctor(results)
    assert f"shard_0-of-2: failed at attempt 3: {kind}: {message}" in said
    assert f"logs/{NAME}/embed_shard_0-of-2.log, results/{NAME}/shards/shard_0-of-2.status.json" in said
    assert step in said
    assert "snakemake --cores all" in advice(said)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100000, b'{"rank": 1}', b'{"status": "complete", "rank": 0}'],
)
def test_a_garbage_status(results: Results, content: bytes) -> None:
    results.statuses[0].write_bytes(content)
    said = doctor(results)
    assert "shard_0-of-2: shard_0-of-2.status.json: not a seqmill status JSON" in said or "recursion" in said
    assert advice(said).startswith(f"rm {results.folder}/shards/shard_0-of-2.h5 && snakemake")


@pytest.mark.parametrize(
    "fields",
    [
        {"shard_bytes": None},
        {"error": "text", "status": "failed"},
        {"error": ["text"], "status": "failed", "attempt": {}},
        {"status": "running", "updated": 5, "done_packs": None},
        {"status": "\ud800"},
        {"status": ["complete"]},
        {"fingerprint": 3},
        {"fingerprint": {}},
        {"audit": None},
    ],
)
def test_a_status_with_odd_values(results: Results, fields: dict[str, object]) -> None:
    edit_status(results.statuses[0], **fields)
    said = doctor(results)
    assert "shards: 1 of 2 complete" in said
    assert "shard_0-of-2: " in said


def test_a_truncated_shard(results: Results) -> None:
    size = results.shards[0].stat().st_size
    os.truncate(results.shards[0], size - 100)
    said = doctor(results)
    assert f"the file has {size - 100} bytes, its status JSON says {size}" in said
    assert advice(said).startswith(f"rm {results.folder}/shards/shard_0-of-2.h5 && snakemake --cores all")
    # A truncated file whose status JSON agrees with its size gets another message.
    edit_status(results.statuses[0], shard_bytes=size - 100)
    assert "not a readable HDF5 shard, or truncated" in doctor(results)


def test_a_flipped_bit_is_found_by_a_full_check(results: Results) -> None:
    flip(results.shards[1], open_shard(results.shards[1]).embeddings.offset + 5)
    os.utime(results.embeddings)  # otherwise the shard is newer
    assert advice(doctor(results, code=0)) == "nothing to do"
    said = doctor(results, "--check")
    assert "shard_1-of-2: its SHA-256 is not the one in its status JSON" in said


@pytest.mark.parametrize("name", ["embeddings.h5", "records.tsv.gz", "index.h5"])
def test_a_flipped_bit_in_another_file(results: Results, name: str) -> None:
    path = results.folder / name
    positions = {
        "embeddings.h5": open_embeddings(results.embeddings).array.offset + 5,
        "index.h5": open_index(results.index).tokens.offset + 5,
        "records.tsv.gz": path.stat().st_size - 9,
    }
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    flip(path, positions[name])
    os.utime(path, ns=times)
    doctor(results, code=0)
    said = doctor(results, "--check")
    assert f"{name}: " in said.splitlines()[1]
    assert advice(said).startswith(f"rm {results.folder}/{name} && snakemake")


HOLD = """
import sys, time
from pathlib import Path
from seqmill.store.shards import open_shard
from seqmill.base.locks import locked_shard
with locked_shard(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_running_with_and_without_a_worker(results: Results) -> None:
    results.shards[0].unlink()
    edit_status(results.statuses[0], status="running", done_packs=1, num_packs=2, updated="2020-01-01T00:00:00+00:00")
    (results.root / ".snakemake/locks").mkdir(parents=True)
    (results.root / ".snakemake/locks/0.input.lock").touch()
    command = [sys.executable, "-c", HOLD, str(results.shards[0])]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as worker:
        try:
            assert worker.stdout.readline() == "held\n"
            said = doctor(results)
        finally:
            worker.kill()
    assert f"{NAME}: running" in said
    assert "shard_0-of-2: running: 1 of 2 packs done, status updated " in said
    assert f" days ago; process {worker.pid} on " in said
    assert advice(said) == "wait: a worker is computing; look again later"
    # A killed worker leaves its lock file, but no process holds the lock.
    said = doctor(results)
    assert "its worker is gone (killed?), no one holds its lock: 1 of 2 packs done" in said
    assert lock_path_of(results.shards[0]).name in said
    assert "first: make sure that no snakemake is running there any more\n" in said
    assert advice(said).startswith("snakemake --cores 1 --unlock ")
    assert " && snakemake --cores all " in advice(said)


def test_a_worker_on_another_machine_whose_lock_is_not_visible_here(results: Results) -> None:
    results.shards[0].unlink()
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    edit_status(results.statuses[0], status="running", done_packs=1, num_packs=2, updated=now)
    lock_path_of(results.shards[0]).write_text("process 7 on node-17 since 2026-01-01 00:00:00")
    assert "shard_0-of-2: running: 1 of 2 packs done, status updated " in doctor(results)
    edit_status(results.statuses[0], updated="2020-01-01T00:00:00+00:00")
    assert "shard_0-of-2: its worker is gone" in doctor(results)


def save_part(results: Results, fingerprint: Fingerprint, packs: list[int]) -> Path:
    index = open_index(results.index)
    folder = results.folder / "shards/parts"
    saved = []
    for pack in packs:
        rows = np.arange(*index.pack_offsets[pack : pack + 2])
        saved.append(PackResult(pack, rows, np.ones((len(rows), 320), np.float32), np.empty(0, np.int64)))
    save_parts(folder, index, fingerprint, saved, "shard_0-of-2.h5", 600)
    return max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def test_saved_packs_are_counted_for_the_attempted_computation(results: Results) -> None:
    results.shards[0].unlink()
    edit_status(results.statuses[0], status="failed", error={"type": "Interrupted", "message": "stopped by SIGTERM"})
    fields = json.loads(results.statuses[0].read_text())["fingerprint"]
    ours = Fingerprint.from_attributes(fields)
    number = len(range(0, open_index(results.index).num_packs, 2))
    part = save_part(results, ours, [0])
    save_part(results, Fingerprint(**{**ours.__dict__, "precision": "bfloat16"}), [2])
    said = doctor(results, "--check")
    assert f"packs: {number} still to do; 1 of them is saved in 1 part file (0.0 MB) and needs no computing" in said
    assert "1 part file (0.0 MB) of another computation is not used: precision is bfloat16, not float32" in said
    status = results.statuses[0].read_text()
    edit_status(results.statuses[0], fingerprint={"model": 5}, updated="9")
    assert "1 part file (0.0 MB) of another computation is not used: precision is " in doctor(results)
    results.statuses[0].write_text(status)
    position = part.read_bytes().find(np.ones(100, np.float32).tobytes())
    flip(part, position)
    assert "damaged" not in doctor(results)
    assert f"damaged part files, whose packs are computed again: {part.name}" in doctor(results, "--check")
    os.truncate(part, 100)
    part.with_name("x.part.h5.damaged").touch()
    assert f"computed again: {part.name}, x.part.h5.damaged" in doctor(results)


@pytest.mark.parametrize(
    ("todo", "saved", "parts", "said"),
    [
        (98, 21, 2, "98 still to do; 21 of them are saved in 2 part files (1.2 MB) and need no computing"),
        (98, 0, 1, "98 still to do; none of them is saved in 1 part file (1.2 MB)"),
        (1, 1, 1, "1 still to do; 1 of them is saved in 1 part file (1.2 MB) and needs no computing"),
        (0, 0, 3, "none still to do; 3 part files (1.2 MB) are left over"),
        (0, 0, 1, "none still to do; 1 part file (1.2 MB) is left over"),
    ],
)
def test_saved_packs_in_words(todo: int, saved: int, parts: int, said: str) -> None:
    assert packs_in_words(todo, saved, parts, 1_200_000) == f"packs: {said}"


def test_a_worker_that_was_really_interrupted(results: Results) -> None:
    for path in (results.shards[0], results.statuses[0], results.embeddings):
        path.unlink()
    command = [sys.executable, str(SCRIPTS / "embed_shard.py"), "--index", str(results.index), "--rank", "0"]
    command += ["--world-size", "2", "--output", str(results.shards[0]), "--status", str(results.statuses[0])]
    command += ["--precision", "float32", "--save-seconds", "0", "--device", "cpu", "--model", MODEL]
    worker = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not results.statuses[0].exists():
            assert worker.poll() is None
            time.sleep(0.02)
        assert "running: " in run_script("doctor.py", cwd=results.root).stdout
        os.kill(worker.pid, signal.SIGTERM)
        assert worker.wait(timeout=60) == 143
    finally:
        worker.kill()
    said = doctor(results, "--check")
    assert "shard_0-of-2: failed at attempt 1: Interrupted: stopped by SIGTERM" in said
    assert "embeddings.h5: not merged" in said


def test_two_world_sizes(results: Results) -> None:
    other = Results(results.folder, 3)
    other.embed()
    other.shards[1].unlink()
    said = doctor(results, code=0)
    assert "shards: 2 of 2 complete" in said
    assert "another set, of 3 shards: 2 complete; the merge would use the set of 2 shards\n" in said
    edit_status(results.statuses[0], status="running")
    results.embeddings.unlink()
    told = "the merge would use the set of 2 shards, whose workers take packs from it if the settings are the same"
    assert f"another set, of 3 shards: 2 complete; {told}" in doctor(results)


def test_many_shards_in_one_state_are_one_line(results: Results) -> None:
    results.embeddings.unlink()
    for path in (*results.shards, results.statuses[1]):
        path.unlink()
    results.statuses[0].rename(results.statuses[0].with_name("shard_0-of-64.status.json"))
    said = doctor(results)
    assert "shards: 0 of 64 complete" in said
    assert "shard_1-of-64 and 62 more: never started" in said
    assert len(said.splitlines()) < 10


@pytest.mark.parametrize("keep", [0, 100, 3000])
def test_a_truncated_merged_file(results: Results, keep: int) -> None:
    os.truncate(results.embeddings, keep)
    said = doctor(results, "--check")
    assert "embeddings.h5: not a readable HDF5 embeddings file, or truncated" in said
    assert advice(said).startswith(f"rm {results.folder}/embeddings.h5 && snakemake --cores all")


@pytest.mark.parametrize("name", ["index.h5", "manifest.json"])
@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n", b"{}", b'{"outputs": []}'])
def test_other_garbage_files(results: Results, name: str, content: bytes) -> None:
    (results.folder / name).write_bytes(content)
    said = doctor(results)
    assert f"{NAME}: damaged\n  {name}: " in said
    assert advice(said).startswith(f"rm {results.folder}/{name} && ")


def test_bytes_flipped_anywhere_do_not_crash_it(results: Results) -> None:
    generator = np.random.default_rng(5)
    files = [path for path in results.folder.rglob("*") if path.is_file()]
    contents = {path: path.read_bytes() for path in files}
    for _ in range(12):
        for path, content in contents.items():
            data = np.frombuffer(content, np.uint8).copy()
            data[generator.integers(0, min(len(data), 4096), 8)] = generator.integers(0, 256, 8)
            path.write_bytes(data.tobytes())
        doctor(results, "--check")


def test_results_not_merged_or_with_older_shards(results: Results) -> None:
    os.utime(results.shards[0])
    assert "embeddings.h5: older than its shards" in doctor(results)
    results.embeddings.unlink()
    assert "embeddings.h5: not merged\n" in doctor(results)
    results.log("merge_shards", "10:00:00 INFO x\n10:00:01 ERROR 1 of 2 shards can't be merged:\n  s.h5: why\n")
    said = doctor(results)
    assert "embeddings.h5: not merged: 1 of 2 shards can't be merged: s.h5: why" in said
    assert f"see logs/{NAME}/merge_shards.log" in said
    assert "first: fix what the error says\n" in said
    assert advice(said).startswith("snakemake --cores all ")


def test_the_manifest_of_other_results(results: Results) -> None:
    manifest = json.loads((results.folder / "manifest.json").read_text())
    manifest["outputs"]["embeddings.h5"]["rows"] += 1
    (results.folder / "manifest.json").write_text(json.dumps(manifest))
    assert "embeddings.h5: not the file that manifest.json describes" in doctor(results)


def test_a_replaced_fasta_is_reported(results: Results) -> None:
    """Its time is older than before, so times show nothing."""
    fasta = results.root / "tiny.faa"
    fasta.write_bytes((Path(open_index(results.index).attributes["source_path"])).read_bytes())
    os.utime(fasta, (0, 0))
    with h5py.File(results.index, "r+") as index:
        del index.attrs["source_path"]
        write_attributes(index, {"source_path": "tiny.faa"})
    assert "changed" not in doctor(results, code=0)
    fasta.write_text(">other\nMKV\n")
    os.utime(fasta, (0, 0))
    said = doctor(results)
    assert "the input has changed: it was tiny.faa (2,4" in said
    assert f"and is {fasta} (11 bytes, SHA-256 " in said


def test_the_audit_is_reported(results: Results) -> None:
    manifest = json.loads((results.folder / "manifest.json").read_text())
    manifest["audit"] = {"audit_sequences": 4, "audit_worst_cosine": 0.99991, "audit_worst_relative_error": 0.01}
    for sequences, verdict in ((0, "ok"), (4, "less exact than they should be")):
        manifest["shards"][1]["audit"] = {"sequences": sequences, "verdict": "warn"}
        (results.folder / "manifest.json").write_text(json.dumps(manifest))
        said = doctor(results, code=0)
        assert f"audit: worst cosine 0.999910 of 4 sequences recomputed: {verdict}\n" in said
    manifest["audit"] = {"audit_sequences": 0}
    manifest["shards"][0]["audit"] = {"sequences": 0, "verdict": "warn", "reference": "none: too little memory"}
    (results.folder / "manifest.json").write_text(json.dumps(manifest))
    assert "audit: no sequence was recomputed: too little memory\n" in doctor(results, code=0)


BAD_RECORD = "10:00:00 ERROR tiny.faa: record 2 ('bad'): '-' at residue 3\n"


@pytest.mark.parametrize("folder", ["results", "results/tiny", f"results/{NAME}", "", "."])
@pytest.mark.parametrize("removed", [0, 1, 2, 3])
def test_an_index_that_could_not_be_built(tmp_path: Path, removed: int, folder: str) -> None:
    """Snakemake removes the folders that it made for the index, and leaves the log."""
    results = Results(tmp_path / "results" / NAME, 1)
    if left := [results.folder, *results.folder.parents[:2], None][removed]:
        left.mkdir(parents=True)
    results.log("build_index", BAD_RECORD)
    said = doctor(results, *([folder] if folder else []))
    assert said.startswith(f"{NAME}: failed\n")
    assert "index: not built: tiny.faa: record 2 ('bad'): '-' at residue 3" in said
    assert f"see logs/{NAME}/build_index.log" in said
    assert "\nfirst: fix what the error says\n" in said


def test_an_index_that_could_not_be_built_among_others(results: Results) -> None:
    results.log("build_index", "10:00:00 INFO tiny.faa: 7 records\n")
    for log in ("other/m/build_index.log", "plan/other/m.log", "fetch_weights/w.log", "slurm/rule/m/build_index.log"):
        path = results.root / "logs" / log
        path.parent.mkdir(parents=True)
        path.write_text(BAD_RECORD)
    said = doctor(results)
    assert re.findall(r"^(.*): (\w+)$", said, re.MULTILINE) == [("other/m", "failed"), (NAME, "complete")]
    assert "first: other/m: fix what the error says\n" in said
    doctor(results, "results/tiny", code=0)
    (results.root / "logs/other/m/build_index.log").write_text("10:00:00 INFO other.faa: 7 records\n")
    doctor(results, code=0)  # its results were deleted


def test_an_index_that_could_not_be_built_again(results: Results) -> None:
    results.index.unlink()
    results.log("build_index", BAD_RECORD)
    said = doctor(results)
    assert "index: not built: tiny.faa: record 2 ('bad'): '-' at residue 3" in said
    assert "\nfirst: fix what the error says\n" in said
    log = results.root / "logs" / NAME / "build_index.log"
    merged = (results.folder / "manifest.json").stat().st_mtime_ns
    os.utime(log, ns=(merged - 1, merged - 1))  # so it was built elsewhere, and deleted after the merge
    assert "index: none; the merged results do not need it" in doctor(results, code=0)


def test_a_download_that_failed_does_not_matter_to_merged_results(results: Results) -> None:
    model = "esm2_t6_8M_UR50D"
    moved = results.folder.rename(results.folder.with_name(model))
    log = results.root / f"logs/fetch_weights/{model}.log"
    log.parent.mkdir(parents=True)
    log.write_text("10:00:00 ERROR cannot fetch https://h/w.pt: no such host\n")
    assert "fetched" not in doctor(results, code=0)
    (moved / "embeddings.h5").unlink()
    said = doctor(results)
    assert "weights: not fetched: cannot fetch https://h/w.pt: no such host\n" in said
    assert "\nfirst: fix what the error says\nfirst: add the --config " in said
    assert advice(said).startswith("snakemake --cores all ")


def test_exports_of_an_earlier_result(results: Results) -> None:
    (results.folder / "exports/embeddings_pt").mkdir(parents=True)
    for name in ("embeddings.npy", "embeddings.npy.ids.txt"):
        (results.folder / "exports" / name).touch()
    assert "exports" not in doctor(results, code=0)
    merged = results.embeddings.stat().st_mtime_ns
    for name in ("embeddings.npy", "embeddings.npy.ids.txt", "embeddings_pt"):
        os.utime(results.folder / "exports" / name, ns=(merged - 1, merged - 1))
    others = ("embeddings_6_max_pt", "embeddings_6_mean_tokens.npy", "embeddings_3_mean.h5ad")  # new as well as old
    for name in (*others, "embeddings_of_mine.csv", "embeddings_-1_max.npy"):
        (results.folder / "exports" / name).touch()
    os.utime(results.folder / "exports" / others[1], ns=(merged - 1, merged - 1))
    said = doctor(results, code=0)
    for name in ("embeddings.npy", "embeddings_pt"):
        assert f"  results/{NAME}/exports/{name}: made from an earlier result; delete it or export again\n" in said
    for name in others:
        assert f"/exports/{name}: embeddings.h5 has no output of this name any more; delete it\n" in said
    assert said.count("/exports/") == 5


def test_leftover_files(results: Results) -> None:
    (results.folder / "shards/.shard_0-of-2.h5.elsewhere.12.tmp").write_bytes(b"half")
    said = doctor(results, code=0)
    assert (
        f"left over, safe to delete if no worker runs on another machine: results/{NAME}/shards/.shard_0-of-2" in said
    )


def test_no_results(tmp_path: Path) -> None:
    results = Results(tmp_path / "results" / NAME, 1)
    assert "results: no such folder" in doctor(results)
    (tmp_path / "results").mkdir()
    assert "results: no results in this folder" in doctor(results)
    (tmp_path / "file").touch()
    doctor(results, "file")


def as_any_user() -> None:
    """Drop root's capabilities to read everything: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    if os.geteuid() == 0:
        for capability in (1, 2):
            ctypes.CDLL(None).prctl(24, capability)  # PR_CAPBSET_DROP


@pytest.mark.parametrize(
    "name",
    ["", "tiny", NAME, *(f"{NAME}/{name}" for name in ("shards", "index.h5", "embeddings.h5", "manifest.json"))]
    + [f"{NAME}/shards/shard_0-of-2{suffix}" for suffix in (".h5", ".status.json")],
)
def test_files_that_the_user_cannot_read(results: Results, name: str) -> None:
    path = results.root / "results" / name
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        if subprocess.run(["test", "-r", path], preexec_fn=as_any_user).returncode == 0:
            pytest.skip("this user can read everything")
        done = run_script("doctor.py", cwd=results.root, preexec_fn=as_any_user)
    finally:
        path.chmod(mode)
    assert done.returncode == 1
    assert done.stderr == ""
    assert ": not readable" in done.stdout
    assert advice(done.stdout).startswith(f"make {Path('results', name)} readable to you")


def test_files_that_no_workflow_made_are_not_given_to_one(results: Results) -> None:
    """Without its settings it would embed the demo."""
    (results.root / ".snakemake").rmdir()
    results.embeddings.unlink()
    assert advice(doctor(results)) == "repeat the commands that made these files"
