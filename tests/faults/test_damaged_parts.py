"""Part files that are damaged, foreign, or wrong with a right checksum: none of their bytes reach a result."""

import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from workers import EACH_PACK, Undisturbed, die_at, digest_of, embed, left_behind, parts_in, status_of

from pipeline import Run
from seqmill.store.part_file import SMALL_DATASETS, PackResult

BFLOAT16 = ("--precision", "bfloat16")  # comes after the default --precision, so that it wins


@pytest.fixture(scope="module", params=["proteins", "contigs"])
def undisturbed(
    undisturbed: Undisturbed, undisturbed_contigs: Undisturbed, request: pytest.FixtureRequest
) -> Undisturbed:
    """Both model families, for every test here."""
    return {"proteins": undisturbed, "contigs": undisturbed_contigs}[request.param]


@pytest.fixture(scope="module")
def with_parts(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every pack in its own part, and no shard: the worker died before it began to write the shard."""
    run = undisturbed.again(tmp_path_factory.mktemp("parts") / "run", 1)
    die_at("before the shard's data", run, 0, *EACH_PACK)
    assert len(parts_in(run)) >= 8
    return run


@pytest.fixture
def run(with_parts: Run, tmp_path: Path) -> Run:
    shutil.copytree(with_parts.folder, tmp_path / "run")
    return Run(tmp_path / "run", 1)


def flip_a_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


ARRAYS = ("index_rows", "embeddings", "quarantined_rows")


def place_of(path: Path, name: str) -> int:
    """Return the file offset of the middle of a dataset's bytes."""
    with h5py.File(path) as file:
        return file[name].id.get_offset() + file[name].size * file[name].dtype.itemsize // 2


def rewrite(path: Path, **changes: np.ndarray) -> None:
    """Change datasets of a part and correct its packs' checksums, as far as there are rows for them."""
    with h5py.File(path, "r+") as file:
        for name, values in changes.items():
            del file[name]
            file.create_dataset(name, data=values)
        packs, rows, embeddings, quarantined = (file[name][:] for name in ("packs", *ARRAYS))
        ends, quarantined_ends = file["pack_ends"][:], file["quarantined_ends"][:]
        starts, quarantined_starts = (np.concatenate(([0], values[:-1])) for values in (ends, quarantined_ends))
        file["pack_digests"][:] = [
            list(PackResult(int(pack), rows[a:b], embeddings[a:b], quarantined[c:d]).digest())
            for pack, a, b, c, d in zip(packs, starts, ends, quarantined_starts, quarantined_ends, strict=True)
        ]


def read(path: Path, name: str) -> np.ndarray:
    with h5py.File(path) as file:
        return file[name][:]


def resume(run: Run, undisturbed: Undisturbed, reused: int) -> str:
    """Resume the worker and return its log; assert the number of reused packs and the undisturbed result."""
    done = embed(run, 0)
    assert done.returncode == 0, done.stderr
    assert status_of(run)["resumed_packs"] == reused
    assert digest_of(run.merge().embeddings) == undisturbed.digest
    return done.stderr


def test_damaged_parts_are_set_aside_and_computed_again(run: Run, undisturbed: Undisturbed) -> None:
    """A bit flipped in the embeddings, the rows, the packs, an attribute, or the header; half a file; an empty file."""
    parts = parts_in(run)
    for part, name in zip(parts, ("embeddings", "index_rows", "packs"), strict=False):
        flip_a_bit(part, place_of(part, name))
    flip_a_bit(parts[3], parts[3].read_bytes().index(undisturbed.model.encode()))
    flip_a_bit(parts[4], 9)
    parts[5].write_bytes(parts[5].read_bytes()[: parts[5].stat().st_size // 2])
    parts[6].write_bytes(b"")
    log = resume(run, undisturbed, len(parts) - 7)
    for part in parts[:7]:
        lines = [line for line in log.splitlines() if f"{part} is damaged" in line]
        assert len(lines) == 1, part
        assert lines[0].endswith(f"set aside as {part.name}.damaged")
    assert left_behind(run.folder) == []


def test_a_bit_flipped_anywhere(run: Run, undisturbed: Undisturbed) -> None:
    """One random bit flipped in each part: whether a part is used or not, the result has the same bits."""
    generator = np.random.default_rng(17)
    parts = parts_in(run)
    for part in parts:
        flip_a_bit(part, int(generator.integers(part.stat().st_size)))
    done = embed(run, 0)
    assert done.returncode == 0, done.stderr
    print(f"{status_of(run)['resumed_packs']} of {len(parts)} used")
    assert status_of(run)["resumed_packs"] < len(parts)
    assert digest_of(run.merge().embeddings) == undisturbed.digest


def test_garbage_named_like_a_part(run: Run, undisturbed: Undisturbed) -> None:
    """The garbage is set aside, and the other parts are used."""
    garbage = run.folder / "parts/shard_0-of-1.h5_pack_00000000-00000009-by-1.part.h5"
    garbage.write_text("Dear all,\n")
    log = resume(run, undisturbed, len(parts_in(run)) - 1)
    assert f"{garbage} is damaged" in log
    assert f"set aside as {garbage.name}.damaged" in log
    assert left_behind(run.folder) == []


def rows_of_the_next(part: Path, following: Path) -> dict[str, np.ndarray]:
    return {name: read(following, name) for name in ("index_rows", "embeddings", "pack_ends")}


def number_of_the_next(part: Path, following: Path) -> dict[str, np.ndarray]:
    return {"packs": read(following, "packs")}


def rows_in_reverse(part: Path, following: Path) -> dict[str, np.ndarray]:
    return {"index_rows": read(part, "index_rows")[::-1], "embeddings": read(part, "embeddings")[::-1]}


def an_early_end(part: Path, following: Path) -> dict[str, np.ndarray]:
    return {"pack_ends": read(part, "pack_ends") - 1}


def an_embedding_less(part: Path, following: Path) -> dict[str, np.ndarray]:
    return {"embeddings": read(part, "embeddings")[:-1]}


def a_row_quarantined_as_well(part: Path, following: Path) -> dict[str, np.ndarray]:
    return {"quarantined_rows": read(part, "index_rows")[:1], "quarantined_ends": np.array([1])}


def packs_that_are_not_in_the_index(part: Path, following: Path) -> dict[str, np.ndarray]:
    return {"packs": read(part, "packs") - 99}


def wider_numbers(part: Path, following: Path) -> dict[str, np.ndarray]:
    return {"embeddings": read(part, "embeddings").astype(np.float64)}


def two_packs_exchanged(part: Path, following: Path) -> dict[str, np.ndarray]:
    """One part with two packs, each with the rows of the other."""
    changes = {name: np.concatenate((read(following, name), read(part, name))) for name in ("index_rows", "embeddings")}
    packs = np.concatenate((read(part, "packs"), read(following, "packs")))
    ends = np.concatenate((read(following, "pack_ends"), read(part, "pack_ends")))
    none = {"quarantined_ends": np.zeros(2, np.int64), "pack_digests": np.zeros((2, 32), np.uint8)}
    return {**changes, **none, "packs": packs, "pack_ends": np.cumsum(ends)}


LIES: list[Callable[[Path, Path], dict[str, np.ndarray]]] = [
    *(rows_of_the_next, number_of_the_next, rows_in_reverse, an_early_end, an_embedding_less),
    *(a_row_quarantined_as_well, packs_that_are_not_in_the_index, wider_numbers, two_packs_exchanged),
]


def test_parts_that_lie(run: Run, undisturbed: Undisturbed) -> None:
    """Rows that do not match the packs are refused, although the part's checksum is right."""
    parts = parts_in(run)
    assert len(parts) > len(LIES)
    sound = [{name: read(part, name) for name in (*SMALL_DATASETS, "embeddings")} for part in parts]
    for place, lie in enumerate(LIES):
        following = run.folder / "following.h5"
        shutil.copy(parts[place], following)
        rewrite(following, **sound[place + 1])
        rewrite(parts[place], **lie(parts[place], following))
    following.unlink()
    log = resume(run, undisturbed, len(parts) - len(LIES))
    for part, lie in zip(parts, LIES, strict=False):
        assert f"{part} is damaged" in log, lie.__name__
    assert log.count("SHA-256") == 0  # refused for another reason than the checksum
    assert left_behind(run.folder) == []


def test_parts_of_other_computations(run: Run, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Parts in another precision or from another FASTA are neither used nor removed, and the log says why."""
    other = Run(tmp_path / "other", 1)
    other.folder.mkdir()
    half = undisturbed.fasta.read_text()[: undisturbed.fasta.stat().st_size // 2].rpartition(">")[0]
    (other.folder / "half.fa").write_text(half)
    other.build(other.folder / "half.fa", undisturbed.model, undisturbed.policy)
    foreign = []
    for folder, settings in ((run.folder, BFLOAT16), (other.folder, ())):
        stopped = Run(tmp_path / f"stopped{len(foreign)}", 1)
        stopped.folder.mkdir()
        shutil.copy(folder / "index.h5", stopped.index)
        die_at("before the rename of the third part", stopped, 0, *EACH_PACK, *settings)
        for part in parts_in(stopped):
            foreign.append(shutil.copy(part, run.folder / f"parts/foreign_{len(foreign)}.part.h5"))
    assert len(foreign) == 4
    log = resume(run, undisturbed, len(parts_in(run)) - len(foreign))
    assert "2 part files in" in log
    assert "are of another computation and not used: precision is bfloat16, not float32" in log
    assert "are of another computation and not used: index_digest is " in log
    assert sorted(map(str, foreign)) == sorted(map(str, parts_in(run)))
