"""A damaged HDF5 file is refused by name, or gives the undamaged result.

This holds for damage anywhere in an index or a shard, and in the metadata of embeddings.h5. Damaged embedding values
differ from their digest in manifest.json. Damage to the text of ids and attributes in embeddings.h5 may go unnoticed:
it is in heaps, for which HDF5 has no checksums, and HDF5 2.0 may read a damaged heap forever.
Every case runs in a child process, so a crash or a hang of the HDF5 library is a failure that names its seed.
"""

import dataclasses
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from damage import bits_flipped, damaged, failures, parts_of

from pipeline import Run
from seqmill.api.embeddings import open_embeddings
from seqmill.base.files import sha256_of_file
from seqmill.errors import SeqmillError
from seqmill.merge.merge import merge_shards
from seqmill.merge.records import write_records
from seqmill.spec.packing import rows_of_rank
from seqmill.store.index import open_index


def test_a_damaged_index(sound: Run, memory_folder: Path) -> None:
    data, expected, target = sound.index.read_bytes(), read_index(sound.index), memory_folder / "index.h5"
    metadata, heaps, _ = parts_of(sound.index)
    assert not heaps

    def attempt(seed: int) -> None:
        target.write_bytes(damaged(data, random.Random(seed), metadata))
        refused_or_equal(target, read_index, expected)

    assert not (wrong := failures(3000, attempt)), wrong


def test_a_damaged_index_of_segments(sound_contigs: Run, memory_folder: Path) -> None:
    data, expected = sound_contigs.index.read_bytes(), read_index(sound_contigs.index)
    target = memory_folder / "index.h5"
    metadata, _, _ = parts_of(sound_contigs.index)

    def attempt(seed: int) -> None:
        target.write_bytes(damaged(data, random.Random(seed), metadata))
        refused_or_equal(target, read_index, expected)

    assert not (wrong := failures(1500, attempt)), wrong


def test_damaged_segments(sound_contigs: Run, memory_folder: Path) -> None:
    """Every flipped bit in the tokens or in the segments' offsets and weights is noticed."""
    data, target = sound_contigs.index.read_bytes(), memory_folder / "index.h5"
    with h5py.File(sound_contigs.index) as file:
        datasets = [file[name] for name in ("tokens", "sequence_segments", "segment_offsets", "segment_lengths")]
        values = [range(d.id.get_offset(), d.id.get_offset() + d.nbytes) for d in datasets]
    assert all(map(len, values))

    def attempt(seed: int) -> None:
        target.write_bytes(bits_flipped(data, random.Random(seed), values))
        try:
            read_index(target)
        except SeqmillError as error:
            check_message(error, target)
        else:
            assert target.read_bytes() == data, "taken for sound"

    assert not (wrong := failures(500, attempt)), wrong


def test_damaged_metadata_of_embeddings(sound: Run, memory_folder: Path) -> None:
    data, expected, target = sound.embeddings.read_bytes(), read_embeddings(sound.embeddings), memory_folder / "e.h5"
    metadata, _, _ = parts_of(sound.embeddings)

    def attempt(seed: int) -> None:
        target.write_bytes(bits_flipped(data, random.Random(seed), metadata))
        refused_or_equal(target, read_embeddings, expected)

    assert not (wrong := failures(2000, attempt)), wrong


def test_truncated_embeddings(sound: Run, memory_folder: Path) -> None:
    data, expected, target = sound.embeddings.read_bytes(), read_embeddings(sound.embeddings), memory_folder / "e.h5"

    def attempt(seed: int) -> None:
        target.write_bytes(data[: random.Random(seed).randrange(len(data))])
        refused_or_equal(target, read_embeddings, expected)

    assert not (wrong := failures(300, attempt)), wrong


def test_the_manifest_digest_detects_damaged_values(sound: Run, memory_folder: Path) -> None:
    data, target = sound.embeddings.read_bytes(), memory_folder / "e.h5"
    digest = sound.manifest["outputs"][sound.embeddings.name]["embeddings_sha256"]
    with h5py.File(sound.embeddings) as file:
        dataset = file["embeddings"]
        values = range(dataset.id.get_offset(), dataset.id.get_offset() + dataset.nbytes)
    assert hashlib.sha256(open_embeddings(sound.embeddings).array).hexdigest() == digest

    def attempt(seed: int) -> None:
        target.write_bytes(bits_flipped(data, random.Random(seed), [values]))
        assert (hashlib.sha256(open_embeddings(target).array).hexdigest() == digest) == (target.read_bytes() == data)

    assert not (wrong := failures(300, attempt)), wrong


def refused_or_equal(path: Path, read: Callable[[Path], dict[str, Any]], expected: dict[str, Any]) -> None:
    try:
        found = read(path)
    except SeqmillError as error:
        check_message(error, path)
        return
    different = [name for name in expected if found[name] != expected[name]]
    assert not different, f"taken for sound, with other {different}"


def check_message(error: SeqmillError, path: Path) -> None:
    assert str(path) in str(error)
    assert len(str(error)) < 1500


def read_index(path: Path) -> dict[str, Any]:
    """Return everything that the later stages read from an index."""
    index = open_index(path)
    found: dict[str, Any] = {
        field.name: as_bytes(getattr(index, field.name))
        for field in dataclasses.fields(index)
        if field.name not in ("path", "attributes", "first_number")
    }
    found["first number"] = index.first_number
    found["attributes"] = index.attributes
    found["ids"] = [index.record_id(number) for number in range(index.num_records)]
    found["packs"] = [as_bytes(index.pack_tokens(pack)) for pack in range(index.num_packs)]
    found["lengths"] = [as_bytes(index.pack_lengths(pack)) for pack in range(index.num_packs)]
    rows = range(index.num_sequences)
    found["segments"] = [[as_bytes(tokens) for tokens in index.row_segments(row)] for row in rows]
    found["weights"] = [as_bytes(index.row_weights(row)) for row in rows]
    found["pack segments"] = [
        [as_bytes(values) for values in index.pack_segments(pack) or ()] for pack in range(index.num_packs)
    ]
    found["rows"] = [as_bytes(rows_of_rank(index.pack_offsets, rank, 3)) for rank in range(3)]
    table = path.with_suffix(".tsv.gz")
    write_records(table, index)
    found["table"] = table.read_bytes()
    return found


def read_embeddings(path: Path) -> dict[str, Any]:
    found = open_embeddings(path)
    return {
        "ids": found.ids,
        "lengths": as_bytes(found.lengths),
        "array": as_bytes(found.array),
        "vectors": [as_bytes(vector) for vector in found],
        "by id": [as_bytes(found[id_]) for id_ in dict.fromkeys(found.ids)],
        "shown": repr(found).replace(str(path), ""),
        "attributes": found.attrs,
    }


def as_bytes(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.str, array.shape, np.ascontiguousarray(array).tobytes()


def merged(run: Run, folder: Path) -> dict[str, Any]:
    """Merge into a temporary `folder` and return the result; check that it leaves all outputs or none."""
    shutil.rmtree(folder, ignore_errors=True)  # left by an earlier case that was killed
    folder.mkdir()
    try:
        output, table, manifest = folder / "embeddings.h5", folder / "records.tsv.gz", folder / "manifest.json"
        merge_shards(run.index, run.shards, run.statuses, output, table, manifest)
        found = read_embeddings(output)
        json.loads(manifest.read_text(encoding="utf-8"))
        return {**{name: found[name] for name in ("ids", "lengths", "array")}, "table": table.read_bytes()}
    finally:
        left = sorted(path.name for path in folder.iterdir())
        shutil.rmtree(folder)
        assert left in ([], ["embeddings.h5", "manifest.json", "records.tsv.gz"]), f"left behind: {left}"


def copy_of(run: Run, folder: Path) -> Run:
    shutil.copytree(run.folder, folder, dirs_exist_ok=True)
    return Run(folder, run.world_size)


def _merge_damaged(source: Run, copy: Run, intact: Path, expected: dict[str, Any], data: bytes, vouch: bool) -> None:
    """Merge with one file replaced by `data`. If `vouch`, the status JSON has the digest of the damaged shard."""
    target = copy.folder / intact.name
    target.write_bytes(data)
    status = target.with_suffix(".status.json")
    if vouch:
        said = json.loads((source.folder / status.name).read_text())
        said |= {"shard_sha256": sha256_of_file(target), "shard_bytes": target.stat().st_size}
        status.write_text(json.dumps(said))
    try:
        found = merged(copy, copy.folder / "merged")
    except SeqmillError as error:
        check_message(error, target)
    else:
        different = [part for part in expected if found[part] != expected[part]]
        assert not different, f"merged, with other {different}"


Damage = Callable[[bytes, random.Random, list[range]], bytes]


def _merge_often(run: Run, folder: Path, file: Path, damage: Damage, cases: int, vouch: bool = False) -> None:
    """Damage one file of a run in many ways; each merge refuses it or gives the same result."""
    copy = copy_of(run, folder / f"copy of {run.folder.name}")
    expected, data = merged(run, folder / "merged"), file.read_bytes()
    likely = parts_of(file)[0] if file == run.index or vouch else []  # otherwise anywhere in a shard

    def attempt(seed: int) -> None:
        hit = damage(data, random.Random(seed), likely)
        _merge_damaged(run, copy, file, expected, hit, vouch)

    assert not (wrong := failures(cases, attempt)), wrong


def test_a_damaged_index_of_segments_is_not_merged(sound_contigs: Run, memory_folder: Path) -> None:
    _merge_often(sound_contigs, memory_folder, sound_contigs.index, damaged, 200)


def test_a_damaged_index_is_not_merged(sound: Run, memory_folder: Path) -> None:
    _merge_often(sound, memory_folder, sound.index, damaged, 500)


def test_a_damaged_shard_is_not_merged(sound: Run, memory_folder: Path) -> None:
    _merge_often(sound, memory_folder, sound.shards[1], damaged, 500)


def test_damaged_metadata_of_a_shard_whose_status_has_its_digest(sound: Run, memory_folder: Path) -> None:
    """The shard is damaged before its digest is taken, so only HDF5's own checksums can notice it."""
    _merge_often(sound, memory_folder, sound.shards[1], bits_flipped, 500, vouch=True)
