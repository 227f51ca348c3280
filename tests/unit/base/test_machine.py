"""The machine, also where Linux's files and calls are absent, as on macOS."""

import os
import platform
import resource
import sys
from pathlib import Path

import pytest

from seqmill.base import machine


@pytest.fixture
def without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")


def test_the_processor_has_a_name_and_no_features_without_proc(without_proc: None) -> None:
    assert machine.processor.__wrapped__() == (f"{platform.machine()} CPU", frozenset())


def test_an_arm_processor_without_a_name(without_proc: None, tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd bf16\nCPU part\t: 0xd4f\n")
    assert machine.processor.__wrapped__() == (f"{platform.machine()} CPU", {"fp", "asimd", "bf16"})


def test_cores_are_those_of_the_process_or_else_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.usable_cores() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.usable_cores() == 1


def test_peak_memory_is_in_bytes_on_linux_and_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS counts in bytes, Linux in KiB."""
    usage = type("Usage", (), {"ru_maxrss": 7})
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    assert machine.peak_memory() == 7 * 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    assert machine.peak_memory() == 7


@pytest.mark.parametrize(("before", "after"), [(256, [10240]), (10240, []), (65536, [])])
def test_a_limit_of_files_that_macos_refuses(before: int, after: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    most, limits = 2**63 - 1, []

    def setrlimit(kind: int, asked: tuple[int, int]) -> None:
        assert (kind, asked[1]) == (resource.RLIMIT_NOFILE, most)
        if asked[0] > 65536:
            raise ValueError("current limit exceeds maximum limit")
        limits.append(asked[0])

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (before, most))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    machine.allow_many_files()
    assert limits == after
