"""Exports on full disks, after interrupts and over earlier exports: whole or absent, with a one-line error."""

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from embeddings_file import random_blocks, write_blocks, write_embeddings
from pipeline import run_script
from seqmill import Embeddings, SeqmillError, open_embeddings
from seqmill.cli import program
from seqmill.export import entries
from seqmill.export.export import export_embeddings
from seqmill.export.formats import FORMATS
from seqmill.export.names import IDS
from seqmill.store import embeddings as stored
from seqmill.store.embeddings import Block, read_blocks

SHAPE = (2_000, 320)
BLOCKS = 20


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "BLOCK_BYTES", 4 * SHAPE[0] * SHAPE[1] // BLOCKS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids = [f"tr|A0A{row:07}|A0A{row:07}_9ZZZZ" for row in range(SHAPE[0])]
    return write_blocks(tmp_path_factory.mktemp("source") / "source.h5", SHAPE, random_blocks(SHAPE), ids)


@pytest.fixture
def blocks_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first rows of the blocks that per-record exports have read so far."""
    begun: list[int] = []

    def counted(embeddings: Embeddings) -> Iterator[Block]:
        for block in read_blocks(embeddings):
            begun.append(block.start)
            yield block

    monkeypatch.setattr(entries, "read_blocks", counted)
    return begun


def limit_files() -> None:
    """Limit every file of this process to 1 MB: a larger write fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


@pytest.mark.parametrize("format_name", ["npy", "parquet", "csv", "h5ad", "h5", "faiss"])
def test_a_full_disk_error_names_the_file(format_name: str, source: Path, tmp_path: Path) -> None:
    if format_name in ("parquet", "faiss"):
        pytest.importorskip({"parquet": "pyarrow", "faiss": "faiss"}[format_name])
    output = tmp_path / f"e.{format_name}"
    arguments = ("--embeddings", source, "--format", format_name, "--output", output)
    done = run_script("export.py", *arguments, preexec_fn=limit_files)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith(f"File too large: '{output}'; make room and run again")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_a_folder_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    wide = write_embeddings(tmp_path / "wide.h5", np.ones((2, 1 << 19)))
    done = run_script(
        "export.py", "--embeddings", wide, "--format=pt", "--output", tmp_path / "pt", preexec_fn=limit_files
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f"File too large: '{tmp_path / 'pt'}'; make room and run again")
    assert list(tmp_path.iterdir()) == [wide]


def test_h5_stops_soon_when_the_disk_is_full(
    source: Path, tmp_path: Path, blocks_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "CHECKED_ROWS", 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: .*e\.h5'$"):
            export_embeddings(source, tmp_path / "e.h5", "h5")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    # HDF5 buffers some entries before it writes them, but not all.
    assert 0 < len(blocks_read) < BLOCKS
    assert list(tmp_path.iterdir()) == []


def test_h5_stops_soon_after_ctrl_c(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def interrupted(embeddings: Embeddings) -> Iterator[Block]:
        for block in read_blocks(embeddings):
            begun.append(block.start)
            if len(begun) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield block

    monkeypatch.setattr(entries, "read_blocks", interrupted)
    monkeypatch.setattr(entries, "CHECKED_ROWS", 10)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make background processes ignore it
    with pytest.raises(KeyboardInterrupt):
        export_embeddings(source, tmp_path / "e.h5", "h5")
    assert len(begun) == 3
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # The same within a program.
    begun.clear()
    assert program.exit_code_of(lambda: export_embeddings(source, tmp_path / "e.h5", "h5")) == 130
    assert len(begun) == 3


@pytest.mark.parametrize("rename", [1, 2])
def test_ids_never_belong_to_another_export_than_the_vectors(
    rename: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export dies before the first or the second rename."""
    output = tmp_path / "e.npy"
    ids = tmp_path / f"e.npy{IDS}"
    export_embeddings(write_embeddings(tmp_path / "old.h5", np.zeros((3, 4)), ["a", "b", "c"]), output, "npy")
    assert ids.read_text() == "a\nb\nc\n"
    new = write_embeddings(tmp_path / "new.h5", np.ones((3, 4)), ["x", "y", "z"])
    replace, calls = Path.replace, []

    def failing(path: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == rename:
            raise OSError("died")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="died"):
        export_embeddings(new, output, "npy")
    assert not ids.exists()
    assert (np.load(output) == rename - 1).all()
    monkeypatch.undo()
    export_embeddings(new, output, "npy")
    assert ids.read_text() == "x\ny\nz\n"
    assert np.load(output).all()


@pytest.mark.parametrize("name", ["e.npy", f"e.npy{IDS}"])
def test_an_output_that_is_a_folder_is_refused_before_anything_is_replaced(name: str, tmp_path: Path) -> None:
    source = write_embeddings(tmp_path / "source.h5", np.ones((3, 4)))
    (tmp_path / name).mkdir()
    other = tmp_path / ({"e.npy", f"e.npy{IDS}"} - {name}).pop()
    other.write_text("of before")
    with pytest.raises(SeqmillError, match=f"{name}: is a folder; name a file in it"):
        export_embeddings(source, tmp_path / "e.npy", "npy")
    assert other.read_text() == "of before"


@pytest.mark.parametrize("format_name", sorted(set(FORMATS) - {"h5_residues"}))
def test_the_requested_space_is_about_the_size_of_an_export(format_name: str, source: Path, tmp_path: Path) -> None:
    if format_name in ("parquet", "faiss"):
        pytest.importorskip({"parquet": "pyarrow", "faiss": "faiss"}[format_name])
    output = tmp_path / f"e.{format_name}"
    export_embeddings(source, output, format_name)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == {"pt": SHAPE[0] + 1, "parquet": 1, "h5ad": 1, "csv": 1, "tsv": 1}.get(format_name, 2)
    block = 4096 if format_name == "pt" else 1
    taken = sum(-(-path.stat().st_size // block) * block for path in files)
    assert 0.97 < FORMATS[format_name].bytes_needed(open_embeddings(source)) / taken < 1.15


@pytest.mark.parametrize(
    ("format_name", "larger"), [("parquet", True), ("csv", True), ("faiss", True), ("npy", False), ("h5", False)]
)
def test_space_for_float16(format_name: str, larger: bool, source: Path) -> None:
    embeddings = open_embeddings(source)
    needed = FORMATS[format_name].bytes_needed(embeddings)
    embeddings.array = embeddings.array.astype(np.float16)
    assert needed - FORMATS[format_name].bytes_needed(embeddings) == (0 if larger else 2 * embeddings.array.size)


def test_pt_on_a_disk_without_space_for_so_many_files(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = list(os.statvfs(tmp_path))
    for files, left, is_refused in (
        (10**6, SHAPE[0], True),
        (0, 0, False),
    ):  # 0 and 0: the file system does not count files
        real[5], real[7] = files, left
        monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(real))
        if is_refused:
            with pytest.raises(
                SeqmillError, match="2000 embeddings as pt are as many files, but the disk has room for only"
            ):
                export_embeddings(source, tmp_path / "pt", "pt")
            export_embeddings(source, tmp_path / "e.npy", "npy")
        else:
            export_embeddings(source, tmp_path / "pt", "pt")
