"""The commands of a working directory: which one made a run, and that its line works in any folder."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from seqmill.run.started import FOLDER, command_again, record_command


def words_of(line: str) -> tuple[str, list[list[str]]]:
    """Return the folder of a line, and the arguments of each `seqmill run` in it."""
    subprocess.run(["bash", "-n", "-c", line], check=True)
    cd, *commands = line.removeprefix("(").removesuffix(")").split(" && ")
    words = [shlex.split(command) for command in commands]
    return shlex.split(cd)[1], [line[line.index("a'b.faa") :] for line in words]


def test_the_last_command_of_each_run_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "my folder"
    here.mkdir()
    monkeypatch.chdir(here)
    commands = [["a'b.faa"], ["a'b.faa", "--gpus", "2"], ["a'b.faa", "--", "--retries", "0"]]
    for number, (arguments, runs) in enumerate(zip(commands, (["a/M", "b/M"], ["a/M"], ["c/M"]), strict=True)):
        record_command(Path("out"), arguments, runs)
        for path in Path("out", FOLDER).iterdir():
            if path.stat().st_mtime_ns > 1_000_000_000_000:
                os.utime(path, ns=(0, number + 1))
    assert len(list(Path("out", FOLDER).iterdir())) == 3
    monkeypatch.chdir("/")
    for run, arguments in zip(("b/M", "a/M", "c/M"), commands, strict=True):
        assert words_of(command_again(here / "out", run)) == (str(here), [arguments])
    options = {"b/M": ["--", "--unlock"], "c/M": ["--unlock"]}
    for run, arguments in (("b/M", commands[0]), ("c/M", commands[2])):
        line = command_again(here / "out", run, unlock=True)
        assert words_of(line) == (str(here), [[*arguments, *options[run]], arguments])
    assert command_again(here / "out", "d/M") == ""
    assert command_again(here, "a/M") == ""

    monkeypatch.chdir(here)
    record_command(Path("out"), commands[0], ["a/M", "b/M"])  # the same again is now the last
    assert len(list(Path("out", FOLDER).iterdir())) == 3
    assert words_of(command_again(here / "out", "a/M")) == (str(here), [commands[0]])


def test_arguments_may_hold_any_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["a'b.faa", os.fsdecode(b"\xff \n$x")]
    record_command(Path(), arguments, ["a/M"])
    assert words_of(command_again(tmp_path, "a/M"))[1] == [arguments]


def test_moved_folders_and_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with its command moves as a whole; else there is no command to repeat."""
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    record_command(Path(), ["a'b.faa"], ["a/M"])
    record_command(Path("../elsewhere"), ["a'b.faa"], ["a/M"])
    monkeypatch.chdir("/")
    (tmp_path / "old").rename(tmp_path / "new")
    assert words_of(command_again(tmp_path / "new", "a/M"))[0] == str(tmp_path / "new")
    assert command_again(tmp_path / "elsewhere", "a/M") == ""
    for content in (b"", b"[]", b"{}", b"\xff"):
        (tmp_path / "new" / FOLDER / "0.json").write_bytes(content)
        assert words_of(command_again(tmp_path / "new", "a/M"))[0] == str(tmp_path / "new")
