"""Files that are whole or absent, errors that name a file, and digests."""

import errno
import hashlib
import io
import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from seqmill.base.files import (
    ABANDONED_SECONDS,
    name_errors,
    refuse_shared,
    remove_abandoned,
    sha256_of_file,
    whole_folder_or_absent,
    whole_or_absent,
    write_json,
)
from seqmill.base.hdf5 import map_dataset, new_hdf5, open_hdf5
from seqmill.errors import SeqmillError

OLD = "the old content"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "result.txt"
    path.write_text(OLD)
    return path


def folder_of(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


def test_success_replaces_the_old_content(path: Path):
    with whole_or_absent(path) as temporary:
        temporary.write_text("the new content")
        assert temporary.parent == path.parent  # a rename across file systems isn't atomic
        assert path.read_text() == OLD
    assert path.read_text() == "the new content"
    assert folder_of(path) == ["result.txt"]


def test_a_new_file_in_a_new_folder(tmp_path: Path):
    path = tmp_path / "a" / "b" / "result.txt"
    with whole_or_absent(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert folder_of(path) == ["result.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("written", ["", "half of the new con"])
def test_an_exception_leaves_the_old_content(error: type[BaseException], written: str, path: Path):
    def write() -> None:
        with whole_or_absent(path) as temporary:
            if written:
                temporary.write_text(written)
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == OLD
    assert folder_of(path) == ["result.txt"]


def test_an_exception_leaves_no_file_where_there_was_none(tmp_path: Path):
    def write() -> None:
        with whole_or_absent(tmp_path / "result.txt") as temporary:
            temporary.write_text("half")
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_writes_nothing_leaves_the_old_content(path: Path):
    with pytest.raises(FileNotFoundError), whole_or_absent(path):
        pass
    assert path.read_text() == OLD
    assert folder_of(path) == ["result.txt"]


def test_a_folder_in_the_way_stays(tmp_path: Path):
    path = tmp_path / "result.txt"
    (path / "kept").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=r"result\.txt"), whole_or_absent(path) as temporary:
        temporary.write_text("new")
    assert folder_of(path) == ["result.txt"]
    assert (path / "kept").is_dir()


def test_a_folder_is_whole_or_absent(tmp_path: Path):
    path, ended = tmp_path / "export", 2**22 + 1  # above any process id
    left = tmp_path / f".export.{socket.gethostname()}.{ended}.tmp"
    left.mkdir()
    (left / "half").touch()

    def write(fail: bool) -> None:
        with whole_folder_or_absent(path) as temporary:
            (temporary / "a").touch()
            if fail:
                raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        write(fail=True)
    assert list(tmp_path.iterdir()) == []
    write(fail=False)
    assert list(tmp_path.rglob("*")) == [path, path / "a"]
    with pytest.raises(SeqmillError, match=r"export: exists"), whole_folder_or_absent(path):
        pass


def test_files_in_one_folder_do_not_collide(tmp_path: Path):
    with whole_or_absent(tmp_path / "a") as one, whole_or_absent(tmp_path / "b") as other:
        one.write_text("a")
        other.write_text("b")
    assert (tmp_path / "a").read_text() == "a"
    assert (tmp_path / "b").read_text() == "b"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_error_names_the_file(path: Path):
    def write() -> None:
        with whole_or_absent(path), Path("/dev/full").open("w") as full:
            full.write("x")

    with pytest.raises(OSError, match=r"No space left on device: '.*result\.txt'") as caught:
        write()
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == OLD
    assert folder_of(path) == ["result.txt"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device: 'here'"),
        (OSError(errno.EACCES, "Permission denied", "there"), "[Errno 13] Permission denied: 'there'"),
        (io.UnsupportedOperation("no such thing"), "no such thing"),
        (ValueError("other"), "other"),
    ],
)
def test_errors_without_a_file_name_get_one(error: Exception, expected: str):
    with pytest.raises(type(error)) as caught, name_errors(Path("here")):
        raise error
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EIO, "Input/output error", ".here.tmp"), "[Errno 5] Input/output error: 'here'"),
        (OSError(errno.EIO, "Input/output error", ".here.tmp/a.pt"), "[Errno 5] Input/output error: 'here'"),
        (OSError(errno.EIO, "Input/output error", "input"), "[Errno 5] Input/output error: 'input'"),
        (OSError("Error closing file"), "here: Error closing file"),
        (OSError("here: Error closing file"), "here: Error closing file"),
    ],
)
def test_errors_of_a_temporary_file_name_the_final_one(error: OSError, expected: str):
    with pytest.raises(OSError) as caught, name_errors(Path("here"), Path(".here.tmp")):  # noqa: PT011
        raise error
    assert str(caught.value) == expected


def test_new_hdf5_raises_a_failed_write_at_the_end(tmp_path: Path):
    """The block continues, and its own exception doesn't hide the cause."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    path = tmp_path / "result.h5"
    path.symlink_to(full)
    reached = []

    def write() -> None:
        with new_hdf5(path) as file:
            file["zeros"] = np.zeros(1_000_000)
            reached.append("the second write")
            file["ones"] = np.ones(1_000_000)
            raise ValueError

    with pytest.raises(OSError, match=r"No space left on device: '.*result\.h5'"):
        write()
    assert reached == ["the second write"]


def test_h5py_and_a_memory_map_read_what_new_hdf5_writes(tmp_path: Path):
    path = tmp_path / "result.h5"
    values = np.arange(3_000_000, dtype=np.int64)
    with new_hdf5(path) as file:
        file["values"] = values
        file["empty"] = np.empty((0, 5), np.float32)
        file.attrs["name"] = "x"
        np.testing.assert_array_equal(file["values"][-5:], values[-5:])
    with open_hdf5(path, "file") as file:
        assert file.attrs["name"] == "x"
        np.testing.assert_array_equal(map_dataset(path, file["values"]), values)
        assert map_dataset(path, file["empty"]).shape == (0, 5)


def test_write_json(tmp_path: Path):
    path = tmp_path / "a" / "status.json"
    content = {"text": '\u86cb\u767d "quoted"', "number": 1.5, "nothing": None, "list": [1, 2]}
    write_json(path, {"old": True})
    write_json(path, content)
    assert json.loads(path.read_text(encoding="utf-8")) == content
    assert "\u86cb" in path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(path, {"object": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == content
    assert folder_of(path) == ["status.json"]


@pytest.mark.parametrize("size", [0, 1, 1000, 3_000_001])
def test_sha256_of_file(size: int, tmp_path: Path):
    content = (b"seqmill" * (size // 7 + 1))[:size]
    path = tmp_path / "file"
    path.write_bytes(content)
    assert sha256_of_file(path) == hashlib.sha256(content).hexdigest()
    path.write_bytes(content + b"x")
    assert sha256_of_file(path) != hashlib.sha256(content).hexdigest()


def test_sha256_of_a_known_file(tmp_path: Path):
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of_file(tmp_path / "abc") == expected


def write_left(folder: Path, name: str, age_seconds: float) -> None:
    path = folder / name
    path.write_bytes(b"half")
    changed = time.time() - age_seconds
    os.utime(path, (changed, changed))


def test_old_temporary_files_of_killed_processes_on_other_machines_are_removed(tmp_path: Path):
    old, fresh = 2 * ABANDONED_SECONDS, ABANDONED_SECONDS / 2
    outputs = [tmp_path / "a.h5", tmp_path / "b" / "b.gz"]
    outputs[1].parent.mkdir()
    removed = [(tmp_path, ".a.h5.node1.cluster.7.tmp"), (outputs[1].parent, ".b.gz.node1.cluster.7.tmp")]
    stays = [
        *[
            (tmp_path, ".a.h5.node2.7.tmp", fresh),
            (outputs[1].parent, ".b.gz.node2.7.tmp", old),
        ],  # node2 still writes a.h5
        (tmp_path, ".c.h5.node1.cluster.7.tmp", old),  # not one of the outputs
        (tmp_path, f".a.h5.{socket.gethostname()}.{os.getpid()}.tmp", old),  # a live process on this machine
        (tmp_path, "a.h5", old),
    ]
    for folder, name in removed:
        write_left(folder, name, old)
    for folder, name, age in stays:
        write_left(folder, name, age)
    remove_abandoned(outputs)
    assert not [name for folder, name in removed if (folder / name).exists()]
    assert not [name for folder, name, _ in stays if not (folder / name).exists()]


def test_outputs_that_are_the_same_file_are_refused(tmp_path: Path):
    there, other, absent = tmp_path / "there", tmp_path / "other", tmp_path / "absent"
    there.touch()
    other.touch()
    (tmp_path / "hard").hardlink_to(there)
    (tmp_path / "soft").symlink_to(there)
    (tmp_path / "to_absent").symlink_to(absent)
    (tmp_path / "folder").symlink_to(tmp_path)
    for one in (tmp_path / "hard", tmp_path / "soft", tmp_path / "folder" / "there", there):
        with pytest.raises(SeqmillError, match="is named for two outputs"):
            refuse_shared([there, other, one])
        with pytest.raises(SeqmillError, match="is the input as well as the output"):
            refuse_shared([other, one], [absent, there])
    for one in (tmp_path / "to_absent", tmp_path / "folder" / "absent"):
        with pytest.raises(SeqmillError, match="is named for two outputs"):
            refuse_shared([absent, one])
    refuse_shared([there, absent], [other, tmp_path / "absent too"])


def test_write_json_of_a_path_that_is_not_utf8(tmp_path: Path):
    path = tmp_path / "status.json"
    write_json(path, {"path": os.fsdecode(b"r\xff/s.h5")})
    assert json.loads(path.read_bytes().decode("utf-8")) == {"path": "r\\udcff/s.h5"}
