"""Names of parts: a worker keeps the parts of running workers, and does not open parts that it cannot use."""

import math
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import h5py
import numpy as np
import pytest

from families import write_fasta
from pipeline import SCRIPTS, SUPPORT, Run, results_of, save_parts
from seqmill.base.locks import locked_shard
from seqmill.embedding.resume import find_parts
from seqmill.embedding.worker import embed_shard
from seqmill.errors import SeqmillError
from seqmill.spec.fingerprint import Fingerprint
from seqmill.store.index import Index, open_index
from seqmill.store.part_file import PackResult
from seqmill.store.parts import PartStore, may_hold, may_hold_only, part_stem, remove_unfinished, shard_of
from seqmill.store.shards import open_shard
from seqmill.store.status import read_status
from sequences import random_sequences

FAULTS = Path(__file__).parents[2] / "faults"
ANY_NAMES = ["shard_3-of-8.h5", "a.h5", "a.hdf5", "a", "two words[1].h5", "x_pack_00000001-00000003-by-2.part.h5.h5"]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("done")
    return Run(folder, 1).build(write_fasta(folder / "short.faa", random_sequences([12] * 800))).embed()


@pytest.fixture(scope="module")
def index(done: Run) -> Index:
    return open_index(done.index)


@pytest.fixture(scope="module")
def results(done: Run) -> list[PackResult]:
    return results_of(done)


@pytest.fixture(scope="module")
def fingerprint(done: Run) -> Fingerprint:
    return Fingerprint.from_attributes(read_status(done.statuses[0]).fingerprint)


@pytest.mark.parametrize("name", ANY_NAMES)
@pytest.mark.parametrize("ending", ["", "_2"])
def test_a_name_tells_the_shard_and_the_possible_packs(name: str, ending: str) -> None:
    part = Path(f"parts/{part_stem(name, [3, 11, 27])}{ending}.part.h5")
    assert shard_of(part) == shard_of(part.with_name(f".{part.name}.a-host.123.tmp")) == name
    assert may_hold(part, range(3, 100, 8))
    assert may_hold(part, range(19, 20))  # the part does not hold pack 19, but its name allows it
    assert not any(may_hold(part, packs) for packs in (range(0, 100, 8), range(0, 100, 2), range(28, 100), range(0)))
    assert may_hold_only(part, range(3, 28, 4))
    assert not any(may_hold_only(part, packs) for packs in (range(3, 27), range(4, 28), range(0, 100, 8)))


@pytest.mark.parametrize("packs", [[0], [5, 3], [0, 1, 3, 4], [7, 107, 57], [123456789]])
def test_a_name_covers_its_packs(packs: list[int]) -> None:
    part = Path(f"{part_stem('a.h5', packs)}.part.h5")
    assert all(may_hold(part, range(pack, pack + 1)) for pack in packs)
    assert may_hold_only(part, range(min(packs), max(packs) + 1))


@pytest.mark.parametrize(
    "name", ["x.part.h5", "rank_0-of-2_pack_00000002.part.h5", "a_pack_00000009-00000001-by-1.part.h5"]
)
def test_any_other_name_may_hold_anything(name: str) -> None:
    assert may_hold(Path(name), range(1))
    assert may_hold_only(Path(name), range(1))


@pytest.mark.parametrize("name", ANY_NAMES)
def test_parts_of_a_running_worker_are_not_removed(
    name: str, index: Index, fingerprint: Fingerprint, results: list[PackResult], tmp_path: Path
) -> None:
    save_parts(tmp_path / "parts", index, fingerprint, results[:2], name)
    packs, store = range(index.num_packs), PartStore(tmp_path / "parts", index, fingerprint)
    with locked_shard(tmp_path / name):
        store.remove(packs, own="another.h5")
        assert len(list((tmp_path / "parts").iterdir())) == 2
        assert len(find_parts(store, packs, False)) == 2  # and other workers can use them
        store.remove(packs[:1], own=name)
        assert len(list((tmp_path / "parts").iterdir())) == 1
    store.remove(packs, own="another.h5")
    assert not list((tmp_path / "parts").iterdir())


@pytest.mark.parametrize("name", ANY_NAMES)
def test_temporary_files_of_another_worker_are_not_removed(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    own, others = (
        [folder.parent / f".{shard}.host.1.tmp", folder / f".{part_stem(shard, [0, 2])}.part.h5.host.1.tmp"]
        for shard in (name, "another.h5")
    )
    for path in (*own, *others):
        path.touch()
    remove_unfinished(tmp_path / name)
    assert [path.exists() for path in (*own, *others)] == [False, False, True, True]


@pytest.mark.full
def test_two_workers_with_the_same_packs_and_other_shards(done: Run, results: list[PackResult], tmp_path: Path) -> None:
    """The first dies with two parts saved and a third half-written; it runs again while the second finishes."""
    run = Run(tmp_path, 1)
    shutil.copy(done.index, run.index)
    first, second = (run.folder / name for name in ("first.h5", "second.h5"))
    tasks = [run.task(0, shard=shard, status=shard.with_suffix(".json")) for shard in (first, second)]
    arguments = ["--index", run.index, "--rank", 0, "--world-size", 1, "--save-seconds", 0, "--device", "cpu"]
    arguments += ["--output", first, "--status", tasks[0].status, "--precision", "float32"]
    died = subprocess.run(
        [sys.executable, FAULTS / "die_at.py", "amid the third part's data", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(SUPPORT), str(SCRIPTS)))},
        capture_output=True,
        text=True,
    )
    assert died.returncode < 0, died.stderr
    saved = sorted(run.folder.glob("parts/*.part.h5"))
    (half,) = run.folder.glob("parts/.*.tmp")
    assert len(saved) == 2
    with locked_shard(first):
        assert embed_shard(tasks[1]).resumed_packs == 2
        assert sorted(run.folder.glob("parts/*.part.h5")) == saved
        assert half.exists()
    assert embed_shard(tasks[0]).resumed_packs == 2
    assert not list((run.folder / "parts").iterdir())
    expected = np.concatenate([result.embeddings for result in results])
    assert all((open_shard(shard).embeddings == expected).all() for shard in (first, second))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the names of the opened HDF5 files."""
    names: list[str] = []

    class Noted(h5py.File):
        def __init__(self, name: object, *arguments: object, **settings: object) -> None:
            names.append(Path(getattr(name, "name", name)).name)
            super().__init__(name, *arguments, **settings)

    monkeypatch.setattr(h5py, "File", Noted)
    return names


@pytest.mark.parametrize("names", ["shard_{}-of-3.h5", "{}.h5"])
def test_a_worker_opens_only_its_own_parts(
    names: str,
    done: Run,
    index: Index,
    fingerprint: Fingerprint,
    results: list[PackResult],
    tmp_path: Path,
    opened: list[str],
) -> None:
    run = Run(tmp_path, 3)
    shutil.copy(done.index, run.index)
    save_by_three(run, index, fingerprint, results, names)
    assert len(list((tmp_path / "parts").iterdir())) == index.num_packs
    opened.clear()
    assert embed_shard(run.task(1)).resumed_packs == len(range(1, index.num_packs, 3))
    found = {shard_of(Path(name)) for name in opened}
    assert found == {names.format(1), ""}
    left = {shard_of(path) for path in (tmp_path / "parts").glob("*.part.h5")}
    assert left == {names.format(0), names.format(2)}


def save_by_three(run: Run, index: Index, fingerprint: Fingerprint, results: list[PackResult], names: str) -> None:
    """Save the packs as the workers of three ranks would."""
    for rank in range(3):
        save_parts(run.folder / "parts", index, fingerprint, results[rank::3], names.format(rank))


def test_finished_packs_need_no_disk_space(
    done: Run,
    index: Index,
    fingerprint: Fingerprint,
    results: list[PackResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk has room for what no rank's parts hold yet, but not for all shards and their parts."""
    run = Run(tmp_path, 3)
    shutil.copy(done.index, run.index)
    for rank in range(3):  # one part per rank, because each part has overhead
        save_parts(tmp_path / "parts", index, fingerprint, results[rank::3], f"shard_{rank}-of-3.h5", math.inf)
    room = 2 * index.num_computed * 4 * 320 - sum(path.stat().st_size for path in (tmp_path / "parts").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 0, room))
    embed_shard(run.task(1))
    shutil.rmtree(tmp_path / "parts")
    with pytest.raises(SeqmillError, match="all shards, and their parts or later the merged file, need"):
        embed_shard(run.task(2))
