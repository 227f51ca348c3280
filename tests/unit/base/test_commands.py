"""Commands in messages work when they are pasted: with the command seqmill, in a clone, and with a package alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import SCRIPTS
from seqmill.base.commands import LAUNCHERS, command

WITHOUT_SEQMILL = "/usr/bin:/bin"


def paste(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line in a shell, in another folder and without the tests' PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    return subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True)


def assert_works(line: str, folder: Path, **variables: str) -> None:
    done = paste(line, folder, **variables)
    assert (done.returncode, done.stdout) == (
        0,
        "untrained:dnabert_s: nothing to fetch: random weights need no files\n",
    )


def test_the_command_seqmill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin/seqmill"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom seqmill.cli.main import main\nmain()\n")  # as pip writes it
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{WITHOUT_SEQMILL}")
    line = command("fetch", "untrained:dnabert_s")
    assert line == "seqmill fetch untrained:dnabert_s"
    assert_works(line, tmp_path, PYTHONPATH=str(SCRIPTS))


@pytest.mark.parametrize("name", ["fetch", "doctor"])
def test_a_clone_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("PATH", WITHOUT_SEQMILL)
    line = command(name, "untrained:dnabert_s")
    assert line.endswith(f"{SCRIPTS / LAUNCHERS.get(name, name)}.py untrained:dnabert_s")
    if name == "fetch":
        assert_works(line, tmp_path)
    else:
        assert "untrained:dnabert_s: no such folder" in paste(line, tmp_path).stdout


def test_an_installed_package_whose_programs_are_not_on_the_path(tmp_path: Path) -> None:
    installed = tmp_path / "site packages"
    shutil.copytree(SCRIPTS / "seqmill", installed / "seqmill", ignore=shutil.ignore_patterns("__pycache__"))
    program = "from seqmill.base.commands import command; print(command('fetch', 'untrained:dnabert_s'))"
    variables = {"PYTHONPATH": str(installed), "PATH": WITHOUT_SEQMILL}
    made = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True
    )
    assert made.stdout.endswith(" -m seqmill fetch untrained:dnabert_s\n"), made.stderr
    assert_works(made.stdout, tmp_path, **variables)


def test_arguments_are_quoted() -> None:
    assert command("doctor", "a folder").endswith(" 'a folder'")
