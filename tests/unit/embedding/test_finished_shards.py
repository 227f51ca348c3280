"""Runs reuse complete shards of another world size if these are sound and have the same fingerprint."""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from families import EACH_KIND, ONE_EACH, PROTEINS, Family, broken_model, write_fasta
from pipeline import Run, results_of, save_parts
from seqmill import open_embeddings
from seqmill.base.hdf5 import write_attributes
from seqmill.embedding.resume import DonePacks, add_finished_shards
from seqmill.embedding.worker import embed_shard
from seqmill.errors import SeqmillError
from seqmill.spec.fingerprint import Fingerprint
from seqmill.spec.outputs import Outputs
from seqmill.spec.packing import packs_of_rank
from seqmill.store.index import Index, open_index
from seqmill.store.parts import PartStore
from seqmill.store.shards import open_shard


@pytest.fixture(scope="module", params=EACH_KIND, ids=str)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Many short sequences in one shard, merged."""
    family: Family = request.param
    folder = tmp_path_factory.mktemp("done")
    fasta = write_fasta(folder / "short.fa", family.random([12] * 1200 if family.is_protein else [60] * 1200))
    return Run(folder, 1).build(fasta, family.model, family.policy).embed().merge()


@pytest.fixture(scope="module")
def index(done: Run) -> Index:
    return open_index(done.index)


@pytest.fixture(scope="module")
def eighths(done: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All but the last of eight shards of the same index."""
    run = Run(tmp_path_factory.mktemp("eighths"), 8)
    shutil.copy(done.index, run.index)
    for rank in range(7):
        embed_shard(run.task(rank))
    shutil.rmtree(run.folder / "parts")  # hard links, which would replace removed shards
    return run


@pytest.fixture
def left(eighths: Run, tmp_path: Path) -> Run:
    shutil.copytree(eighths.folder, tmp_path / "run")
    return Run(tmp_path / "run", 8)


def status_of(run: Run, rank: int = 0) -> dict:
    return json.loads(run.statuses[rank].read_text())


def edit_status(run: Run, rank: int, **changes: object) -> None:
    run.statuses[rank].write_text(json.dumps({**status_of(run, rank), **changes}))


def fingerprint_of(run: Run) -> Fingerprint:
    return Fingerprint.from_attributes(status_of(run)["fingerprint"])


def resumed(run: Run) -> int:
    return sum(status_of(run, rank)["resumed_packs"] for rank in range(run.world_size))


def packs_of(index: Index, ranks: range, world_size: int) -> set[int]:
    return {pack for rank in ranks for pack in packs_of_rank(index.num_packs, rank, world_size)}


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_every_pack_of_complete_shards_is_reused_with_another_world_size(
    done: Run, index: Index, left: Run, world_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    before = {path: path.read_bytes() for path in left.shards[:7]}
    run = Run(left.folder, world_size).embed()
    assert resumed(run) == len(packs_of(index, range(7), 8))
    assert (open_embeddings(run.merge().embeddings)[:] == open_embeddings(done.embeddings)[:]).all()
    assert all(path.read_bytes() == content for path, content in before.items())
    assert "7 shards of another number of shards remain" in caplog.text


def test_values_of_shards_and_of_parts_are_combined(done: Run, index: Index, tmp_path: Path) -> None:
    """Shown by changed values: two of three shards are made from parts, and the other values are still in parts."""
    shutil.copy(done.index, tmp_path / "index.h5")
    results = [replace(result, embeddings=result.embeddings + 1 + result.pack) for result in results_of(done)]
    save_parts(tmp_path / "parts", index, fingerprint_of(done), results, "shard_0-of-9.h5")
    thirds = Run(tmp_path, 3)
    for rank in range(2):
        embed_shard(thirds.task(rank))
    run = Run(tmp_path, 2).embed()
    assert resumed(run) == index.num_packs
    expected = np.concatenate([result.embeddings for result in results])
    shards = [open_shard(path) for path in run.shards]
    for shard in shards:
        assert (shard.embeddings == expected[shard.index_rows]).all()
        assert shard.computed_by == sorted({"a CPU", *status_of(thirds)["run"]["computed_by"]})
    run.merge()
    assert not (tmp_path / "parts").exists()


def test_each_kind_of_device_is_named_once(done: Run, index: Index, tmp_path: Path) -> None:
    shutil.copy(done.index, tmp_path / "index.h5")
    results = results_of(done)
    for kind, some in (("a CPU", results[::2]), ("a GPU", results[1::2])):
        folder = tmp_path / kind
        save_parts(folder, index, fingerprint_of(done), some, "shard_0-of-9.h5")
        for path in folder.iterdir():
            with h5py.File(path, "r+") as part:
                del part.attrs["computed_by"]
                write_attributes(part, {"computed_by": kind})
            (tmp_path / "parts").mkdir(exist_ok=True)
            path.rename(tmp_path / "parts" / path.name)
    first = Run(tmp_path, 1).embed()
    assert status_of(first)["run"]["computed_by"] == ["a CPU", "a GPU"]
    run = Run(tmp_path, 2).embed()
    assert resumed(run) == index.num_packs
    assert [status_of(run, rank)["run"]["computed_by"] for rank in range(2)] == [["a CPU", "a GPU"]] * 2
    assert open_embeddings(run.merge().embeddings).attrs["computed_by"] == "a CPU; a GPU"


@pytest.mark.parametrize("family", ONE_EACH, ids=str)
def test_quarantined_sequences_are_reused_or_tried_again(family: Family, tmp_path: Path) -> None:
    model = broken_model(family, tmp_path, math.nan)
    halves = Run(tmp_path, 2).build(family.write_odd(tmp_path), model, family.policy).embed(on_error="skip")
    expected = open_embeddings(halves.merge().embeddings)[:]
    num_packs = sum(status_of(halves, rank)["num_packs"] for rank in range(2))
    quarantined = sorted(row for path in halves.shards for row in open_shard(path).quarantined_rows.tolist())
    assert quarantined
    whole = Run(tmp_path, 1)
    with pytest.raises(SeqmillError, match="no finite embedding"):
        whole.embed()
    shutil.rmtree(tmp_path / "parts")
    bad = {int(np.searchsorted(open_index(whole.index).pack_offsets, row, side="right")) - 1 for row in quarantined}
    assert resumed(whole) == num_packs - len(bad)
    whole.embed(on_error="skip")
    assert resumed(whole) == num_packs
    assert open_shard(whole.shards[0]).quarantined_rows.tolist() == quarantined
    assert status_of(whole)["quarantined"]["num_sequences"] == len(quarantined)
    assert np.array_equal(open_embeddings(whole.merge().embeddings)[:], expected)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_residues_are_reused(dtype: str, tmp_path: Path) -> None:
    outputs = Outputs((-1, 2), per_residue=dtype)
    run = Run(tmp_path, 1).build(PROTEINS.write_odd(tmp_path), PROTEINS.model).embed(outputs=outputs)
    before = open_shard(run.shards[0])
    expected = before.residues.tobytes(), before.residue_offsets.tolist()
    thirds = Run(tmp_path, 3).embed(outputs=outputs)
    assert resumed(thirds) == open_index(run.index).num_packs
    run.shards[0].unlink()
    run.embed(outputs=outputs)
    after = open_shard(run.shards[0])
    assert resumed(run) == open_index(run.index).num_packs
    assert (after.residues.tobytes(), after.residue_offsets.tolist()) == expected
    assert (after.embeddings == before.embeddings).all()


def flip_a_bit(run: Run) -> None:
    shard = open_shard(run.shards[0])
    data = bytearray(run.shards[0].read_bytes())
    data[shard.embeddings.offset + shard.embeddings.nbytes // 2] ^= 4
    run.shards[0].write_bytes(data)


def cut_off(run: Run) -> None:
    run.shards[0].write_bytes(run.shards[0].read_bytes()[:-100])


def of_other_settings(run: Run) -> None:
    embed_shard(run.task(0, outputs=Outputs((0,))))
    shutil.rmtree(run.folder / "parts")


UNSOUND: dict[str, tuple[Callable[[Run], object], str]] = {
    "one bit flipped": (flip_a_bit, "its SHA-256 is not the one in its status JSON"),
    "truncated": (cut_off, "truncated or changed"),
    "without a status": (lambda run: run.statuses[0].unlink(), "no such status JSON"),
    "a status that is none": (lambda run: run.statuses[0].write_text("{"), "not a seqmill status JSON"),
    "running": (lambda run: edit_status(run, 0, status="running"), ""),
    "failed": (lambda run: edit_status(run, 0, status="failed"), ""),
    "removed": (lambda run: run.shards[0].unlink(), ""),
    "a failed audit": (lambda run: edit_status(run, 0, audit={"verdict": "fail"}), "its audit failed"),
    "a status of another rank": (lambda run: shutil.copy(run.statuses[1], run.statuses[0]), "SHA-256|bytes"),
    "of other settings": (of_other_settings, "1 shards in .* are of another computation and not used: layers is 0"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_a_shard_that_is_not_sound_is_not_used(
    case: str, done: Run, index: Index, left: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 0 of 4 needs shards 0 and 4 of 8; shard 0 is damaged and shard 4 is used."""
    damage, message = UNSOUND[case]
    damage(left)
    names = {path.name for path in left.folder.iterdir()}
    caplog.clear()
    run = Run(left.folder, 4)
    embed_shard(run.task(0))
    assert status_of(run)["resumed_packs"] == len(packs_of(index, range(4, 5), 8))
    shard, expected = open_shard(run.shards[0]), open_shard(done.shards[0])
    assert (shard.embeddings == expected.embeddings[shard.index_rows]).all()
    assert names <= {path.name for path in left.folder.iterdir()}  # nothing is set aside
    said = [text for record in caplog.records if "not used" in (text := record.getMessage())]
    assert len(said) == bool(message)
    assert re.search(message, "".join(said))


def test_a_shard_that_is_deleted_is_not_computed_twice(done: Run, index: Index, tmp_path: Path) -> None:
    """Snakemake deletes outputs that are older than their input, for example after a clock was set back."""
    shutil.copy(done.index, tmp_path / "index.h5")
    run = Run(tmp_path, 2).embed()
    before = [path.read_bytes() for path in run.shards]
    for path in (*run.shards, *run.statuses):
        path.unlink()
    run.embed()
    assert resumed(run) == index.num_packs
    assert [path.read_bytes() for path in run.shards] == before
    run.merge()
    assert not (tmp_path / "parts").exists()


def test_without_hard_links_the_parts_stay_until_the_merge(
    done: Run, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    shutil.copy(done.index, tmp_path / "index.h5")
    run = Run(tmp_path, 2).embed(save_seconds=0)
    for path in (*run.shards, *run.statuses):
        path.unlink()
    run.embed()
    assert resumed(run) == index.num_packs
    run.merge()
    assert not (tmp_path / "parts").exists()


def found_in(run: Run, index: Index, packs: range) -> DonePacks:
    done = DonePacks(index)
    store = PartStore(run.folder / "parts", index, fingerprint_of(run))
    add_finished_shards(done, store, run.folder, packs, with_quarantined=False)
    return done


@pytest.mark.parametrize("replaced", [False, True])
def test_a_shard_that_is_removed_or_replaced_while_it_is_used(
    replaced: bool, done: Run, index: Index, left: Run
) -> None:
    packs = packs_of_rank(index.num_packs, 0, 4)
    parts = found_in(left, index, packs)
    for path in left.shards[:7]:
        if replaced:
            Path(shutil.copy(done.index, left.folder / "new")).replace(path)
        else:
            path.unlink()
    expected = results_of(done)
    assert [result.digest() for result in parts.results(packs)] == [expected[pack].digest() for pack in packs]


def test_a_shard_that_changes_while_it_is_used(index: Index, left: Run) -> None:
    packs = packs_of_rank(index.num_packs, 0, 8)
    parts = found_in(left, index, packs)
    shard = open_shard(left.shards[0])
    with left.shards[0].open("r+b") as file:
        file.seek(shard.embeddings.offset)
        file.write(b"\1\2\3\4")
    with pytest.raises(SeqmillError, match=r"shard_0-of-8\.h5: damaged since it was written: .*; run again to compute"):
        list(parts.results(packs))
    assert left.shards[0].exists()
    assert len(found_in(left, index, packs)) == 0


def test_a_shard_without_packs_of_the_rank_is_not_read(
    index: Index, left: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """Damage to it or to its status is not noticed."""
    for path in (left.shards[1], left.statuses[2]):
        path.write_bytes(b"damaged")
    assert len(found_in(left, index, packs_of_rank(index.num_packs, 0, 4))) > 0
    assert len(found_in(left, index, packs_of_rank(index.num_packs, 7, 8))) == 0
    assert "not used" not in caplog.text
