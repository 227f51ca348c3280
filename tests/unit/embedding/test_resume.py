"""Part files: an attempt of any world size reuses the packs of earlier ones if they are sound and compatible."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from families import EACH_KIND, Family
from pipeline import CONTIGS_DEMO, DEMO, Run, results_of, save_parts
from seqmill import open_embeddings
from seqmill.embedding.resume import DonePacks, find_parts
from seqmill.errors import SeqmillError
from seqmill.model.weights import load_weights
from seqmill.spec.fingerprint import Fingerprint
from seqmill.spec.models import find_model
from seqmill.store.index import Index, open_index
from seqmill.store.part_file import PackResult, open_part
from seqmill.store.parts import PartStore


@pytest.fixture(scope="module", params=EACH_KIND, ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def done(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The family's demo, computed in one shard without interruption."""
    fasta = DEMO if family.is_protein else CONTIGS_DEMO
    return Run(tmp_path_factory.mktemp("done"), 1).build(fasta, family.model, family.policy).embed().merge()


@pytest.fixture(scope="module")
def index(done: Run) -> Index:
    return open_index(done.index)


@pytest.fixture(scope="module")
def fingerprint(family: Family, index: Index) -> Fingerprint:
    weights = load_weights(find_model(family.model))
    layers = str(weights.architecture.num_layers)
    return Fingerprint(index.digest, family.model, weights.digest, layers, "mean", "float32")


@pytest.fixture(scope="module")
def results(done: Run) -> list[PackResult]:
    return results_of(done)


def save(folder: Path, index: Index, fingerprint: Fingerprint, results: list[PackResult], name: str = "a") -> DonePacks:
    return save_parts(folder, index, fingerprint, results, name)


def embed_from_parts(run: Run, world_size: int) -> list[dict]:
    """Embed and merge in `world_size` shards, next to the parts in the folder; return the statuses."""
    other = Run(run.folder, world_size)
    other.embed().merge()
    return [json.loads(status.read_text()) for status in other.statuses]


def copy_index(done: Run, folder: Path) -> Run:
    folder.mkdir(exist_ok=True)
    (folder / "index.h5").write_bytes(done.index.read_bytes())
    return Run(folder, 1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_resumed_run_gives_the_same_values_row_by_row(
    done: Run, index: Index, fingerprint: Fingerprint, results: list[PackResult], tmp_path: Path, world_size: int
) -> None:
    """Parts of two ranks of another world size, with gaps, as a crash leaves them."""
    run = copy_index(done, tmp_path)
    save(tmp_path / "parts", index, fingerprint, results[0:7:3], "shard_0-of-3.h5")
    save(tmp_path / "parts", index, fingerprint, results[4:10:3], "shard_1-of-3.h5")
    statuses = embed_from_parts(run, world_size)
    assert sum(status["resumed_packs"] for status in statuses) == 5
    assert sum(status["done_packs"] for status in statuses) == index.num_packs
    found, expected = open_embeddings(run.embeddings), open_embeddings(done.embeddings)
    assert found.ids == expected.ids
    assert (found[:] == expected[:]).all()
    assert not (tmp_path / "parts").exists()


def test_nothing_is_computed_when_parts_have_everything(
    done: Run, index: Index, fingerprint: Fingerprint, results: list[PackResult], tmp_path: Path
) -> None:
    """The parts have changed values, which arrive in the result."""
    run = copy_index(done, tmp_path)
    changed = [replace(result, embeddings=result.embeddings + 1) for result in results]
    save(tmp_path / "parts", index, fingerprint, changed)
    statuses = embed_from_parts(run, 2)
    assert sum(status["resumed_packs"] for status in statuses) == index.num_packs
    assert (open_embeddings(run.embeddings)[:] == open_embeddings(done.embeddings)[:] + 1).all()


def test_a_damaged_part_is_set_aside_and_computed_again(
    done: Run, index: Index, fingerprint: Fingerprint, results: list[PackResult], tmp_path: Path
) -> None:
    run = copy_index(done, tmp_path)
    folder = tmp_path / "parts"
    save(folder, index, fingerprint, results[:6])
    paths = sorted(folder.glob("*.part.h5"))
    assert len(paths) == 6
    with h5py.File(paths[0], "r+") as part:
        part["embeddings"][0, 0] += 1
    with h5py.File(paths[1], "r+") as part:
        part["index_rows"][0] += 1
    paths[2].write_bytes(paths[2].read_bytes()[:-100])
    with h5py.File(paths[3], "r+") as part:
        del part["pack_ends"]
    found = find_parts(PartStore(folder, index, fingerprint), range(index.num_packs), with_quarantined=True)
    assert sorted(pack for pack in range(6) if pack in found) == [4, 5]
    assert sorted(path.name for path in folder.glob("*.damaged")) == [f"{path.name}.damaged" for path in paths[:4]]
    embed_from_parts(run, 1)
    assert (open_embeddings(run.embeddings)[:] == open_embeddings(done.embeddings)[:]).all()
    assert not folder.exists()


def test_too_little_memory_is_not_mistaken_for_damage(
    index: Index, fingerprint: Fingerprint, results: list[PackResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, index, fingerprint, results[:1])
    (path,) = tmp_path.glob("*.part.h5")
    read = h5py.Dataset.__getitem__

    def fail_at_embeddings(self: h5py.Dataset, place: object) -> object:
        if self.name == "/embeddings":
            raise MemoryError
        return read(self, place)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", fail_at_embeddings)
    with pytest.raises(MemoryError):
        find_parts(PartStore(tmp_path, index, fingerprint), range(1), with_quarantined=True)
    assert path.exists()


def test_a_part_with_rows_of_other_packs_is_set_aside(
    index: Index, fingerprint: Fingerprint, results: list[PackResult], tmp_path: Path
) -> None:
    lying = replace(results[0], pack=1)
    save(tmp_path, index, fingerprint, [lying])
    assert len(find_parts(PartStore(tmp_path, index, fingerprint), range(2), with_quarantined=True)) == 0
    assert list(tmp_path.glob("*.damaged"))


def test_parts_with_another_fingerprint_are_kept_but_not_used(
    index: Index,
    fingerprint: Fingerprint,
    results: list[PackResult],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save(tmp_path, index, replace(fingerprint, precision="bfloat16"), results[:3])
    store = PartStore(tmp_path, index, fingerprint)
    assert len(find_parts(store, range(3), with_quarantined=True)) == 0
    assert "3 part files" in caplog.text
    assert "precision is bfloat16, not float32" in caplog.text
    store.remove(range(index.num_packs))
    assert len(list(tmp_path.glob("*.part.h5"))) == 3


def test_only_parts_that_no_other_rank_needs_are_removed(
    index: Index, fingerprint: Fingerprint, results: list[PackResult], tmp_path: Path
) -> None:
    save_parts(tmp_path, index, fingerprint, results[:2], "mixed", seconds=1000)  # one part, because no save is due
    save(tmp_path, index, fingerprint, results[2:3])
    assert len(list(tmp_path.glob("*.part.h5"))) == 2
    PartStore(tmp_path, index, fingerprint).remove(range(0, index.num_packs, 2))
    assert [open_part(path).packs.tolist() for path in tmp_path.glob("*.part.h5")] == [[0, 1]]


def test_quarantined_packs_count_as_done_only_if_allowed(
    index: Index, fingerprint: Fingerprint, results: list[PackResult], tmp_path: Path
) -> None:
    result = results[5]
    bad = replace(
        result,
        index_rows=result.index_rows[1:],
        embeddings=result.embeddings[1:],
        quarantined_rows=result.index_rows[:1],
    )
    save(tmp_path, index, fingerprint, [results[4], bad])
    store = PartStore(tmp_path, index, fingerprint)
    strict = find_parts(store, range(4, 6), with_quarantined=False)
    assert (4 in strict, 5 in strict) == (True, False)
    lenient = find_parts(store, range(4, 6), with_quarantined=True)
    assert lenient.quarantined(range(4, 6)) == [result.index_rows[0]]
    save(tmp_path, index, fingerprint, [result])  # another attempt did better
    assert find_parts(store, range(4, 6), with_quarantined=True).quarantined(range(4, 6)) == []


def test_a_part_damaged_between_writing_and_use_stops_the_shard(
    index: Index, fingerprint: Fingerprint, results: list[PackResult], tmp_path: Path
) -> None:
    parts = save(tmp_path, index, fingerprint, results[:1])
    (path,) = tmp_path.glob("*.part.h5")
    with h5py.File(path, "r+") as part:
        part["embeddings"][0, 0] += 1
    with pytest.raises(SeqmillError, match=r"damaged since it was written.*run again to compute its packs"):
        list(parts.results(range(1)))
    assert not path.exists()


def test_rows_of_parts_are_found(
    index: Index, fingerprint: Fingerprint, results: list[PackResult], tmp_path: Path
) -> None:
    parts = save(tmp_path, index, fingerprint, results)
    for row in (0, 1, index.num_sequences // 2, index.num_sequences - 1):
        pack = int(np.searchsorted(index.pack_offsets, row, side="right")) - 1
        expected = results[pack].embeddings[row - index.pack_offsets[pack]]
        assert (parts.embedding(row) == expected).all()


def test_the_merge_names_parts_of_other_settings(
    done: Run, index: Index, fingerprint: Fingerprint, results: list[PackResult], tmp_path: Path, caplog
) -> None:
    run = copy_index(done, tmp_path)
    save(tmp_path / "parts", index, replace(fingerprint, layers="0"), results[:2])
    run.embed().merge()
    assert len(list((tmp_path / "parts").glob("*.part.h5"))) == 2
    assert "2 part files of runs with other settings remain" in caplog.text
