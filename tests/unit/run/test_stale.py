"""Existing results against the request: kept, computed again, or refused."""

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from edited_run import FASTAS, EditedRun, checkpoint
from pipeline import MODEL, Run
from seqmill.base.files import sha256_of_file
from seqmill.base.hdf5 import write_attributes
from seqmill.base.input_files import KnownDigests, note_file
from seqmill.errors import SeqmillError
from seqmill.run.project import mark_stale
from seqmill.run.stale import Refusal, Request, find_fasta_edit, stale_results, started_world_size
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import find_model
from seqmill.spec.outputs import Outputs

HOUR = 3600


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EditedRun:
    """A finished run in one shard."""
    monkeypatch.chdir(tmp_path)
    run = EditedRun(tmp_path, random.Random(0))
    assert run.run() == ["index", "embed", "merge"]
    return run


def reasons(run: EditedRun, shards: int = 1, **changes: object) -> dict[str, str]:
    request = Request(Path(run.fasta), find_model("model.pt"), LengthPolicy(), Outputs(), "float32")
    paths = [run.results / f"shards/shard_{rank}-of-{shards}.h5" for rank in range(shards)]
    digests = KnownDigests(Path("digests.json"))
    stale = stale_results(run.results, replace(request, **changes), paths, digests)
    digests.save()
    return {path.name: reason for path, reason in stale.items()}


def test_results_of_the_same_request_are_kept(run: EditedRun) -> None:
    assert reasons(run) == {}
    assert reasons(run, precision="auto") != {}  # the run set it to float32
    assert reasons(run, outputs=Outputs((2,))) == {}  # the last layer by its number
    assert reasons(run, on_error="skip") == {}


SETTINGS = {
    "max_length": ({"policy": LengthPolicy(max_length=50)}, "index.h5", "max_length was 1022 and is 50 now"),
    "long_sequences": ({"policy": LengthPolicy("full", 0)}, "index.h5", "long_sequences was truncate and is full now"),
    "reuse": ({"reused": ("abc",)}, "index.h5", "reuse names other results than before"),
    "precision": ({"precision": "bfloat16"}, "shard_0-of-1.h5", "precision was float32 and is bfloat16 now"),
    "layers": ({"outputs": Outputs((0, -1))}, "shard_0-of-1.h5", "layers was 2 and is 0,2 now"),
    "pooling": ({"outputs": Outputs((-1,), ("max",))}, "shard_0-of-1.h5", "pooling was mean and is max now"),
    "residues": (
        {"outputs": Outputs(per_residue="float16")},
        "shard_0-of-1.h5",
        "per_residue was false and is float16 now",
    ),
    "dtype": ({"dtype": "float16"}, "embeddings.h5", "dtype was float32 and is float16 now"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_another_setting_makes_its_dependents_stale(name: str, run: EditedRun) -> None:
    changes, first, reason = SETTINGS[name]
    files = ["index.h5", "shard_0-of-1.h5", "embeddings.h5"]
    found = reasons(run, **changes)
    assert found[first] == reason
    assert list(found) == files[files.index(first) :]


def test_unchanged_input_is_not_read_and_touched_input_once(run: EditedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def sha256(path: Path) -> str:
        read.append(str(path))
        return sha256_of_file(path)

    monkeypatch.setattr("seqmill.base.input_files.sha256_of_file", sha256)
    assert reasons(run) == {}
    assert read == []
    for path in ("a.fa", "model.pt"):
        os.utime(path)
    assert reasons(run) == {}
    assert read == ["a.fa", "model.pt"]
    assert reasons(run) == {}
    assert read == ["a.fa", "model.pt"]


@pytest.mark.parametrize("days_ago", [0.1, 30])
def test_an_edited_fasta_is_computed_again_and_a_replaced_one_is_refused(run: EditedRun, days_ago: float) -> None:
    before = Path("a.fa").read_bytes()
    run.write("a.fa", FASTAS[1].encode(), days_ago)
    if days_ago < 3:
        found = reasons(run)
        assert found["index.h5"].startswith("the input was a.fa (23 bytes, SHA-256 ")
        assert list(found) == ["index.h5", "shard_0-of-1.h5", "embeddings.h5"]
        return
    with pytest.raises(Refusal, match=r"results/a/model holds the results of a\.fa \(.*another file .*a\.fa \(.*touch"):
        reasons(run)
    with pytest.raises(Refusal):
        find_fasta_edit(run.results, Path("a.fa"), KnownDigests(Path("digests.json")))
    run.write("a.fa", before, 40)  # the right one is back, with another time
    assert reasons(run) == {}


def test_another_path_is_refused_only_if_its_content_differs(run: EditedRun) -> None:
    Path("sub").mkdir()
    Path("a.fa").rename("sub/a.fa")
    run.fasta = "sub/a.fa"
    assert reasons(run) == {}
    Path("sub/a.fa").write_text(FASTAS[2])
    with pytest.raises(
        Refusal, match=r"results/a/model holds the results of a\.fa; to embed sub/a\.fa, rename its data"
    ):
        reasons(run)
    (run.results / "index.h5").unlink()  # the merged result shows it too
    with pytest.raises(Refusal):
        reasons(run)
    with pytest.raises(Refusal):
        find_fasta_edit(run.results, Path("sub/a.fa"), KnownDigests(Path("digests.json")))


def test_replaced_weights(run: EditedRun, tmp_path: Path) -> None:
    run.write("model.pt", checkpoint(1, tmp_path), 0.1)
    found = reasons(run)
    assert list(found) == ["shard_0-of-1.h5", "embeddings.h5"]
    assert found["embeddings.h5"].startswith("the input was model.pt (")
    run.write("model.pt", checkpoint(1, tmp_path), 30)
    with pytest.raises(Refusal, match=r"holds the results of model\.pt \("):
        reasons(run)


def test_quarantined_records_count_only_while_they_may_be_skipped(run: EditedRun) -> None:
    import h5py

    with h5py.File(run.results / "embeddings.h5", "r+") as file:
        counts = file.attrs["fate_counts"].decode().replace('"quarantined": 0', '"quarantined": 2')
        del file.attrs["fate_counts"]
        write_attributes(file, {"fate_counts": counts})
    assert reasons(run, on_error="skip") == {}
    assert reasons(run) == {"embeddings.h5": "sequences were quarantined (2): on_error was skip and is fail now"}


def test_invalid_records_count_only_while_they_may_be_skipped(run: EditedRun) -> None:
    import h5py

    assert reasons(run, on_invalid="skip") == {}  # there is none, so the setting does not matter
    for name in ("index.h5", "embeddings.h5"):
        with h5py.File(run.results / name, "r+") as file:
            assert file.attrs["num_invalid"] == 0
            del file.attrs["num_invalid"]
    assert reasons(run) == {}  # as in results of before
    for name in ("embeddings.h5", "index.h5"):
        with h5py.File(run.results / name, "r+") as file:
            file.attrs["num_invalid"] = 2
        assert reasons(run, on_invalid="skip") == {}
        assert reasons(run)[name] == "invalid records were left out (2): on_invalid was skip and is fail now"


@pytest.mark.parametrize("name", ["index.h5", "embeddings.h5", "shards/shard_0-of-1.h5", "manifest.json"])
def test_truncated_files_are_stale(name: str, run: EditedRun) -> None:
    path = run.results / name
    path.write_bytes(path.read_bytes()[:-100])
    assert (Path(name).name if name != "manifest.json" else "embeddings.h5") in reasons(run)


def test_a_complete_set_of_shards_of_this_index_precedes_an_incomplete_one(tmp_path: Path) -> None:
    assert started_world_size(tmp_path) == 0
    (tmp_path / "a.fa").write_text(FASTAS[0])
    run = Run(tmp_path, 3).build(tmp_path / "a.fa", MODEL).embed()
    (tmp_path / "shards").mkdir()
    for path in tmp_path.glob("shard_*"):
        path.rename(tmp_path / "shards" / path.name)
    for path in ("shard_0-of-3.h5", "shard_1-of-3.h5"):
        shutil.copy(tmp_path / "shards" / path, tmp_path / "shards" / path.replace("of-3", "of-8"))
        status = path.replace(".h5", ".status.json")
        shutil.copy(tmp_path / "shards" / status, tmp_path / "shards" / status.replace("of-3", "of-8"))
    assert started_world_size(tmp_path) == 3
    (tmp_path / "shards/shard_2-of-3.h5").unlink()
    assert started_world_size(tmp_path) == 8
    run.index.unlink()
    assert started_world_size(tmp_path) == 8
    (tmp_path / "a.fa").write_text(FASTAS[1])
    run.build(tmp_path / "a.fa", MODEL)
    assert started_world_size(tmp_path) == 0


def test_modification_times_follow_the_judgment(tmp_path: Path) -> None:
    mark, stale, future = (tmp_path / name for name in ("mark", "stale", "future"))
    for path in (stale, future):
        path.touch()
    later = future.stat().st_mtime + HOUR
    os.utime(future, (later, later))
    mark_stale(mark, {}, [future, tmp_path / "absent"])
    assert mark.exists()
    assert future.stat().st_mtime < later
    before = mark.read_text()
    mark_stale(mark, {}, [stale, future])
    assert mark.read_text() == before
    mark_stale(mark, {stale: "it has changed"}, [stale, future])
    assert "stale: it has changed" in mark.read_text()
    assert stale.stat().st_mtime < mark.stat().st_mtime


def test_a_file_that_changes_during_its_digest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "growing.fa"
    path.write_text(">a\nMKV\n")

    def digest_and_grow(path: Path) -> str:
        with path.open("a") as file:
            file.write(">b\nMKV\n")
        return "0" * 64

    monkeypatch.setattr("seqmill.base.input_files.sha256_of_file", digest_and_grow)
    with pytest.raises(SeqmillError, match=r"growing\.fa: the file changed while it was read"):
        note_file(path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', '{"a": ["b"]}', "[" * 10000])
def test_a_damaged_list_of_digests_counts_as_empty(content: str, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(content)
    (tmp_path / "a").write_bytes(b"abc")
    digests = KnownDigests(tmp_path / "d.json")
    assert digests.sha256(tmp_path / "a").startswith("ba7816bf")
    digests.save()
    assert "ba7816bf" in (tmp_path / "d.json").read_text()
