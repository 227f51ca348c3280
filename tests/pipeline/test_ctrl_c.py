"""Ctrl-C during an index build or a merge stops it at the next step, although HDF5 delays signals."""

import os
import signal
import zlib
from collections.abc import Callable
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline import DEMO, MODEL, Run
from seqmill.base import hdf5
from seqmill.index import arrange, build
from seqmill.index.build import build_index
from seqmill.merge import records
from seqmill.merge.records import write_records
from seqmill.spec.lengths import LengthPolicy
from seqmill.store import index, index_format
from seqmill.store.index import open_index
from sequences import random_sequences


@pytest.fixture(autouse=True)
def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make background processes ignore it


class Calls:
    """Wraps a function, counts its calls, and sends SIGINT at one of them."""

    def __init__(self, function: Callable[..., object], interrupt_at: int = 0) -> None:
        self.function, self.interrupt_at, self.number = function, interrupt_at, 0

    def __call__(self, *arguments: object, **options: object) -> object:
        self.number += 1
        if self.number == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        return self.function(*arguments, **options)


STEPS = [
    (arrange, "unique_sequences", arrange, "find_reused"),
    (arrange, "choose_pack_tokens", arrange, "plan_packs"),
    (build, "_copy", build, "_write_tokens"),
    (build, "_write_tokens", build, "content_digest"),
    (build, "content_digest", build, "write_attributes"),
]


@pytest.mark.parametrize(("module", "begun", "next_module", "never_begun"), STEPS, ids=[step[1] for step in STEPS])
def test_an_index_build_stops_after_the_step(
    module: object, begun: str, next_module: object, never_begun: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, after = Calls(getattr(module, begun), 1), Calls(getattr(next_module, never_begun))
    monkeypatch.setattr(module, begun, first)
    monkeypatch.setattr(next_module, never_begun, after)
    with pytest.raises(KeyboardInterrupt):
        build_index(DEMO, tmp_path / "index.h5", MODEL, LengthPolicy())
    assert (first.number, after.number) == (1, 0)
    assert list(tmp_path.iterdir()) == []


def test_an_index_build_stops_between_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "COPY_BYTES", 1)  # write each pack separately
    packs = Calls(zlib.crc32, 3)
    monkeypatch.setattr(build.zlib, "crc32", packs)
    with pytest.raises(KeyboardInterrupt):
        build_index(DEMO, tmp_path / "index.h5", MODEL, LengthPolicy())
    assert packs.number == 3
    assert list(tmp_path.iterdir()) == []


def test_an_index_build_stops_within_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Calls(np.ascontiguousarray, 3)
    monkeypatch.setattr(index_format, "DIGEST_ROWS", 10)
    monkeypatch.setattr(index_format, "np", SimpleNamespace(ascontiguousarray=blocks))
    with pytest.raises(KeyboardInterrupt):
        build_index(DEMO, tmp_path / "index.h5", MODEL, LengthPolicy())
    assert blocks.number == 3
    assert list(tmp_path.iterdir()) == []


def test_a_merge_stops_within_its_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of records, written at the same time, stops too."""
    fasta = tmp_path / "some.faa"
    fasta.write_text("".join(f">id{n}\n{s}\n" for n, s in enumerate(random_sequences([9] * 50))))
    run = Run(tmp_path, 1).build(fasta).embed()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(hdf5, "STRING_BLOCK", 10)
    blocks = Calls(index.split_bytes, 2)
    monkeypatch.setattr(index, "split_bytes", blocks)
    with pytest.raises(KeyboardInterrupt):
        run.merge()
    assert blocks.number == 2
    assert sorted(tmp_path.iterdir()) == before


def test_an_unwanted_table_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_index(Run(tmp_path, 1).build(DEMO).index)
    monkeypatch.setattr(records, "BLOCK", 10)
    unwanted, lines = Event(), records._lines
    begun = []

    def unwanted_amid(*arguments: object) -> str:
        begun.append(arguments)
        if len(begun) == 2:
            unwanted.set()
        return lines(*arguments)

    monkeypatch.setattr(records, "_lines", unwanted_amid)
    write_records(tmp_path / "records.tsv.gz", index, unwanted=unwanted)
    assert len(begun) == 2
