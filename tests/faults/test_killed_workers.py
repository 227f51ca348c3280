"""SIGKILL at any moment: the next attempt produces the same bits as an undisturbed run."""

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from die_at import MOMENTS
from workers import EACH_PACK, Undisturbed, die_at, finish, left_behind, packs_done, parts_in, start, status_of

from pipeline import Run
from seqmill.spec.packing import packs_of_rank
from seqmill.store.index import open_index

CASES, CASES_OF_WINDOWS = 18, 5
CHAINS = 2


@dataclass(frozen=True)
class Moment:
    """`seconds` after `packs` packs were saved; 0 packs: after the start of Python.

    It counts packs because, on a busy machine, the same seconds may cover an import or a whole computation.
    """

    packs: int
    seconds: float


def random_moment(generator: random.Random, undisturbed: Undisturbed, most_packs: int) -> Moment:
    """Draw from the whole life of a worker that has `most_packs` packs to compute."""
    packs = max(generator.randint(-3, most_packs), 0)  # import and loading take as long as some packs
    stretch = undisturbed.compute_seconds / 5 if packs else undisturbed.seconds - undisturbed.compute_seconds
    return Moment(packs, generator.uniform(0, stretch))


def kill_at(run: Run, ranks: tuple[int, ...], moment: Moment) -> list[int]:
    """Start workers, kill them all at the moment, and return their exit codes (0: the worker had finished)."""
    before = len(parts_in(run))
    workers = [start(run, rank, *EACH_PACK) for rank in ranks]
    try:
        # At the end, a worker removes its parts, except those that another world size still needs.
        while len(parts_in(run)) < before + moment.packs and any(worker.poll() is None for worker in workers):
            time.sleep(0.005)
        time.sleep(moment.seconds)
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    return [worker.returncode for worker in workers]


def test_killed_at_random_moments(undisturbed: Undisturbed, tmp_path: Path) -> None:
    kill_and_resume(undisturbed, tmp_path, CASES)


def test_killed_at_random_moments_with_windows(undisturbed_windows: Undisturbed, tmp_path: Path) -> None:
    kill_and_resume(undisturbed_windows, tmp_path, CASES_OF_WINDOWS)


def kill_and_resume(undisturbed: Undisturbed, tmp_path: Path, cases: int) -> None:
    """The same bits after a kill -9 at any moment and a resume with another world size; nothing is left behind."""
    generator = random.Random(20240611)
    killed = with_parts = 0
    for case in range(cases):
        folder = tmp_path / str(case)
        ranks = ((0,), (1,), (0, 1))[case % 3]
        moment = random_moment(generator, undisturbed, 5 * len(ranks))
        world_size = generator.choice((1, 3))
        codes = kill_at(undisturbed.again(folder, 2), ranks, moment)
        again = undisturbed.again(folder, world_size)
        parts, expected = len(parts_in(again)), packs_done(again)
        digest, packs = finish(again)
        said = f"case {case}: ranks {ranks} of 2, {moment}, {codes}, {parts} parts, resumed in {world_size} shards"
        print(f"{said}: {packs} packs reused")
        assert digest == undisturbed.digest, said
        assert left_behind(folder) == [], said
        assert packs == expected >= parts, said  # every part holds one pack, and each was used
        killed += codes.count(-signal.SIGKILL)
        with_parts += parts > 0
    assert killed > cases / 2
    assert with_parts > cases / 4


@pytest.mark.parametrize("seed", range(CHAINS))
def test_killed_again_and_again(undisturbed: Undisturbed, tmp_path: Path, seed: int) -> None:
    """Three kills in a row, each with another world size: the final run combines the packs of all of them."""
    generator = random.Random(seed)
    for world_size in generator.sample((1, 2, 3, 5), 3):
        run = undisturbed.again(tmp_path / "chain", world_size)
        rank = generator.randrange(world_size)
        codes = kill_at(run, (rank,), Moment(1, generator.uniform(0, undisturbed.compute_seconds / 5)))
        print(f"rank {rank} of {world_size}: {codes}, {len(parts_in(run))} parts so far")
    run = undisturbed.again(tmp_path / "chain", 4)
    expected = packs_done(run)
    digest, packs = finish(run)
    assert digest == undisturbed.digest
    assert packs == expected > 0
    assert left_behind(tmp_path) == []


# How many of the rank's parts exist after each moment; None: all of them; -2: all but two.
SAVED = {
    "before the first status": 0,
    "before the first part": 0,
    "amid the third part's data": 2,
    "before the rename of the third part": 2,
    "after the rename of the third part": 3,
    "before the shard's data": None,
    "amid the shard's data": None,
    "before the rename of the shard": None,
    "after the rename of the shard": None,
    "before the final status": None,
    "before the rename of the final status": None,
    "before the link of the shard": None,
    "before the removal of the third part": -2,
    "before the removal of the lock": 0,
}


@pytest.mark.parametrize(
    ("moment", "world_size"),
    [*((moment, (1, 3, 2)[n % 3]) for n, moment in enumerate(SAVED)), ("before the link of the shard", 1)],
)
def test_killed_at_a_named_moment(undisturbed: Undisturbed, tmp_path: Path, moment: str, world_size: int) -> None:
    die_and_resume(undisturbed, tmp_path, moment, world_size)


@pytest.mark.parametrize(
    ("moment", "world_size"),
    [
        ("amid the third part's data", 1),
        ("before the final status", 3),
    ],
)
def test_killed_at_a_named_moment_with_windows(
    undisturbed_windows: Undisturbed, tmp_path: Path, moment: str, world_size: int
) -> None:
    die_and_resume(undisturbed_windows, tmp_path, moment, world_size)


def die_and_resume(undisturbed: Undisturbed, tmp_path: Path, moment: str, world_size: int) -> None:
    """Each step of writing parts, shard and status: complete files are used, half-written ones are not."""
    assert SAVED.keys() == set(MOMENTS)
    run = undisturbed.again(tmp_path / "run", 2)
    die_at(moment, run, 0, *EACH_PACK)
    done = moment.startswith(("before the link", "before the removal"))
    if moment == "before the first status":
        assert not run.statuses[0].exists()
    else:
        assert status_of(run)["status"] == ("complete" if done else "running")
    saved = SAVED[moment]
    num_packs = len(packs_of_rank(open_index(run.index).num_packs, 0, 2))
    expected = saved if saved is not None and saved >= 0 else num_packs + (saved or 0)
    assert len(parts_in(run)) == expected
    other = undisturbed.again(run.folder, world_size)
    # With another world size, a complete shard counts as well as the parts.
    assert packs_done(other) == (num_packs if done and world_size != 2 else expected)
    digest, packs = finish(other)
    assert digest == undisturbed.digest
    assert packs == (num_packs if done else expected)  # a complete shard's second name lets its own rank reuse it
    assert left_behind(run.folder) == []
