"""The merge refuses every incomplete or damaged set of shards, names the culprit, and writes nothing."""

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import pytest

from families import EACH_KIND, PROTEINS, Family, write_fasta
from pipeline import Run, run_script
from seqmill.base.files import sha256_of_file
from seqmill.errors import SeqmillError
from seqmill.merge import verify
from seqmill.merge.merge import merge_shards
from seqmill.merge.verify import _verify_together, verify_shards
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.outputs import Outputs
from seqmill.store.index import Index, open_index

WORLD_SIZE = 3


@dataclass
class Embedded(Run):
    """Three sound shards, not yet merged, and their FASTA."""

    family: Family = PROTEINS

    @property
    def fasta(self) -> Path:
        return self.folder / "some.fa"

    def other(self, world_size: int = WORLD_SIZE, policy: LengthPolicy | None = None) -> Run:
        """An index of the same FASTA in another folder."""
        return Run(self.folder / "other", world_size).build(self.fasta, self.family.model, policy or self.family.policy)


@pytest.fixture(scope="module", params=EACH_KIND, ids=str)
def embedded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    family: Family = request.param
    run = Embedded(tmp_path_factory.mktemp("embedded"), WORLD_SIZE, family)
    # Long enough for three packs, so that no shard is empty.
    lengths = [900, 500, 500, 400, 300, 40, 40, 7] if family.is_protein else [1500, 800, 700, 610, 400, 300, 40, 7]
    run.build(write_fasta(run.fasta, family.random(lengths)), family.model, family.policy).embed()
    assert open_index(run.index).num_packs >= WORLD_SIZE
    return run


@pytest.fixture
def run(embedded: Embedded, tmp_path: Path) -> Embedded:
    shutil.copytree(embedded.folder, tmp_path / "run")
    return replace(embedded, folder=tmp_path / "run")


def edit_status(run: Run, shard: int, **changes: object) -> None:
    content = json.loads(run.statuses[shard].read_text())
    run.statuses[shard].write_text(json.dumps({**content, **changes}))


def edit_shard(run: Run, rank: int, change: Callable[[h5py.File], None]) -> None:
    """Change a shard's content, and its status JSON to match the changed file."""
    with h5py.File(run.shards[rank], "r+") as file:
        change(file)
    shard = run.shards[rank]
    edit_status(run, rank, shard_sha256=sha256_of_file(shard), shard_bytes=shard.stat().st_size)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def set_value(name: str, row: int, value: object) -> Callable[[h5py.File], None]:
    return lambda file: file[name].__setitem__(row, value)


def drop_a_row(file: h5py.File) -> None:
    for name in ("embeddings", "index_rows", "sequence_ids"):
        values = file[name][:-1]
        dtype = file[name].dtype
        del file[name]
        file.create_dataset(name, data=values, dtype=dtype)


def as_float64(file: h5py.File) -> None:
    values = file["embeddings"][:].astype("f8")
    del file["embeddings"]
    file["embeddings"] = values


def narrower(file: h5py.File) -> None:
    values = file["embeddings"][:, :-1]
    del file["embeddings"]
    file["embeddings"] = values


def one_id_less(file: h5py.File) -> None:
    ids = file["sequence_ids"][:-1]
    dtype = file["sequence_ids"].dtype
    del file["sequence_ids"]
    file.create_dataset("sequence_ids", data=ids, dtype=dtype)


def take_its_second(other: Run, run: Run) -> None:
    for pair in ((other.shards, run.shards), (other.statuses, run.statuses)):
        shutil.copy(pair[0][1], pair[1][1])


def of_other_index(run: Embedded) -> None:
    take_its_second(run.other(policy=LengthPolicy("truncate", 800)).embed(), run)


def of_other_precision(run: Embedded) -> None:
    take_its_second(run.other().embed("bfloat16"), run)


def of_other_pooling(run: Embedded) -> None:
    take_its_second(run.other().embed(outputs=Outputs((-1,), ("max",))), run)


def of_other_world_size(run: Embedded) -> None:
    take_its_second(run.other(world_size=2).embed(), run)


def copy_of_rank_0(run: Run) -> None:
    shutil.copy(run.shards[0], run.shards[1])
    shutil.copy(run.statuses[0], run.statuses[1])


DAMAGE: dict[str, tuple[Callable[[Embedded], object], str]] = {
    "no status": (lambda run: run.statuses[1].unlink(), "no such status JSON"),
    "status is not JSON": (lambda run: run.statuses[1].write_text("{"), "not a seqmill status JSON"),
    "status is a list": (lambda run: run.statuses[1].write_text("[1]"), "not a seqmill status JSON"),
    "status lacks a field": (lambda run: run.statuses[1].write_text('{"rank": 1}'), "not a seqmill status JSON"),
    "status running": (lambda run: edit_status(run, 1, status="running"), "running"),
    "status failed": (
        lambda run: edit_status(run, 1, status="failed", error={"type": "OutOfMemory", "message": "too big"}),
        "OutOfMemory: too big",
    ),
    "status of another rank": (lambda run: edit_status(run, 1, rank=2), "rank 1 of 3"),
    "status of another world size": (lambda run: edit_status(run, 1, world_size=4), "one of 4 shards"),
    "no shard": (lambda run: run.shards[1].unlink(), "no such shard"),
    "empty shard file": (lambda run: run.shards[1].write_bytes(b""), "0 bytes"),
    "truncated shard": (lambda run: run.shards[1].write_bytes(run.shards[1].read_bytes()[:-9]), "truncated"),
    "flipped bit": (lambda run: flip_a_bit(run.shards[1]), "SHA-256"),
    "shard copied over another": (copy_of_rank_0, "rank 0 is also in"),
    "of another index": (of_other_index, "another index"),
    "of another precision": (of_other_precision, "precision is bfloat16, not float32"),
    "of another pooling": (of_other_pooling, "pooling is max, not mean"),
    "of another world size": (of_other_world_size, "one of 2 shards"),
    "NaN": (lambda run: edit_shard(run, 1, set_value("embeddings", (0, 3), float("nan"))), "is not finite"),
    "infinity": (lambda run: edit_shard(run, 1, set_value("embeddings", (1, 0), float("inf"))), "is not finite"),
    "a row gone": (lambda run: edit_shard(run, 1, drop_a_row), "not those of rank 1"),
    "another row number": (lambda run: edit_shard(run, 1, set_value("index_rows", 0, 0)), "not those of rank 1"),
    "another id": (lambda run: edit_shard(run, 1, set_value("sequence_ids", 0, "other")), "the id 'other'"),
    "float64": (lambda run: edit_shard(run, 1, as_float64), "float64"),
    "another dimension": (lambda run: edit_shard(run, 1, narrower), "embeddings have {narrower} dimensions"),
    "an id too few": (lambda run: edit_shard(run, 1, one_id_less), "has the id None where the index has"),
    "no ids": (lambda run: edit_shard(run, 1, lambda file: file.__delitem__("sequence_ids")), "lacks sequence_ids"),
    "no fingerprint": (lambda run: edit_shard(run, 1, lambda file: file.attrs.__delitem__("layers")), "lacks 'layers'"),
    "changed fingerprint": (
        lambda run: edit_shard(run, 1, lambda file: file.attrs.__setitem__("precision", "float16")),
        "does not match its fields",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_nothing_is_written(run: Embedded, name: str) -> None:
    damage, message = DAMAGE[name]
    message = message.format(narrower=run.family.hidden_dim - 1)
    damage(run)
    before = sorted(run.folder.iterdir())
    with pytest.raises(SeqmillError) as error:
        run.merge()
    print(error.value)
    assert message in str(error.value)
    assert "shard_1-of-3" in str(error.value)
    assert "shard_2-of-3" not in str(error.value)
    assert sorted(run.folder.iterdir()) == before


def test_sound_shards_merge_in_any_order(run: Run) -> None:
    done = run_script(
        "merge_shards.py", "--index", run.index, "--shards", *run.shards[::-1], "--output", run.embeddings
    )
    assert done.returncode == 0, done.stderr
    in_order = Run(run.folder, WORLD_SIZE).merge().embeddings.read_bytes()
    assert run.embeddings.read_bytes() == in_order


def test_too_few_and_too_many_shards_are_refused(run: Run) -> None:
    for shards in (run.shards[:2], [*run.shards, run.shards[0]]):
        done = run_script("merge_shards.py", "--index", run.index, "--shards", *shards, "--output", run.embeddings)
        assert done.returncode == 1
        assert f"one of 3 shards, but {len(shards)} were given" in done.stderr
        assert "Traceback" not in done.stderr
        assert not run.embeddings.exists()


def test_all_bad_shards_are_named_at_once(run: Run) -> None:
    flip_a_bit(run.shards[0])
    run.statuses[2].unlink()
    with pytest.raises(SeqmillError, match=r"2 of 3 shards can't be merged"):
        run.merge()


def test_a_sequence_in_two_shards_is_noticed_without_the_pack_plan(run: Run) -> None:
    index = open_index(run.index)
    verified = verify_shards(index, run.shards, run.statuses)
    first, second, _ = verified.shards
    with pytest.raises(SeqmillError, match="times in the shards, not once"):
        _verify_together(index, [first, second, second])


def test_a_result_never_replaces_an_input(run: Run) -> None:
    before = run.shards[0].read_bytes()
    done = run_script("merge_shards.py", "--index", run.index, "--shards", *run.shards, "--output", run.shards[0])
    assert done.returncode == 1
    assert "is the input as well as the output" in done.stderr
    assert run.shards[0].read_bytes() == before


@pytest.mark.parametrize("same", ["--records", "--manifest"])
def test_results_never_replace_one_another(same: str, run: Run) -> None:
    before = sorted(run.folder.iterdir())
    arguments = ("--index", run.index, "--shards", *run.shards, "--output", run.embeddings, same, run.embeddings)
    done = run_script("merge_shards.py", *arguments)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"{run.embeddings}: is named for two outputs" in done.stderr
    assert sorted(run.folder.iterdir()) == before


@pytest.mark.parametrize("name", ["records.tsv.gz", "manifest.json"])
def test_a_folder_in_the_way_does_not_lose_an_earlier_result(name: str, run: Run) -> None:
    before = run.merge().embeddings.read_bytes()
    (run.folder / name).unlink()
    (run.folder / name).mkdir()
    with pytest.raises(SeqmillError, match=f"{name}: is a folder"):
        run.merge()
    assert run.embeddings.read_bytes() == before


def test_old_temporary_files_of_a_merge_on_another_machine_are_removed(run: Run) -> None:
    left = [run.folder / f".{name}.node-17.12.tmp" for name in ("embeddings.h5", "records.tsv.gz")]
    for path in left:
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    alive = run.folder / ".embeddings.h5.node-18.12.tmp"
    alive.write_bytes(b"half")
    run.merge()
    assert [path for path in (*left, alive) if path.exists()] == [alive]


def test_a_full_disk_stops_the_merge_with_one_line(run: Run) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    before = sorted(run.folder.iterdir())
    arguments = ("--index", run.index, "--shards", *run.shards, "--output", run.embeddings)
    done = run_script("merge_shards.py", *arguments, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "embeddings.h5" in done.stderr
    assert sorted(run.folder.iterdir()) == before


def test_an_earlier_result_survives_a_refused_merge(run: Run) -> None:
    before = run.merge().embeddings.read_bytes()
    flip_a_bit(run.shards[0])
    with pytest.raises(SeqmillError):
        run.merge()
    assert run.embeddings.read_bytes() == before


def test_a_damaged_index_is_refused(run: Run) -> None:
    run.index.write_bytes(run.index.read_bytes()[:-100])
    with pytest.raises(SeqmillError, match=r"index\.h5"):
        run.merge()


def test_a_fasta_that_has_changed_since_the_index_was_built_is_refused(run: Embedded) -> None:
    def merge(fasta: Path) -> None:
        folder = run.folder
        results = (run.embeddings, folder / "records.tsv.gz", folder / "manifest.json")
        merge_shards(run.index, run.shards, run.statuses, *results, fasta=fasta)

    merge(run.fasta)  # a copy of the one it was built from
    run.embeddings.unlink()
    merge(run.folder / "no longer there.fa")
    run.embeddings.unlink()
    before = run.fasta.stat()
    run.fasta.write_bytes(run.fasta.read_bytes()[:-2] + b"A\n")
    os.utime(run.fasta, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(SeqmillError, match=r"index\.h5 was made from .*some\.fa \(.*, not from .*some\.fa \("):
        merge(run.fasta)
    assert not run.embeddings.exists()


def test_equal_runs_give_equal_files(embedded: Embedded, tmp_path: Path) -> None:
    arguments = (embedded.fasta, embedded.family.model, embedded.family.policy)
    runs = [Run(tmp_path / name, WORLD_SIZE).build(*arguments).embed().merge() for name in ("first", "second")]
    for name in ("embeddings.h5", "records.tsv.gz"):
        assert (runs[0].folder / name).read_bytes() == (runs[1].folder / name).read_bytes()


def test_ctrl_c_keeps_further_shards_from_being_read(run: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def slow(index: Index, path: Path, *_: object) -> None:
        """Stands in for reading a large shard; Ctrl-C comes during the first."""
        begun.append(path)
        if len(begun) == 1:
            raise KeyboardInterrupt
        time.sleep(0.2)

    monkeypatch.setattr(verify, "verify_shard", slow)
    monkeypatch.setattr(verify, "usable_cores", lambda: 2)  # so two are read at a time
    with pytest.raises(KeyboardInterrupt):
        verify_shards(open_index(run.index), run.shards * 20, run.statuses * 20)
    time.sleep(0.5)
    assert len(begun) < 20
