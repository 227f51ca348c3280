"""Commands in messages work when they are pasted: with the command seqmill, in a clone, and with a package alone."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
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


def make_environment(folder: Path) -> Path:
    """Make a virtual environment with the command seqmill and the packages of the tests; return its programs."""
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob("lib/python3*/site-packages")
    (site_packages / "others.pth").write_text(f"{SCRIPTS}\n{sysconfig.get_path('purelib')}\n")
    program = folder / "bin/seqmill"
    program.write_text(f"#!{folder}/bin/python\nfrom seqmill.cli.main import main\nmain()\n")  # as pip writes it
    program.chmod(0o755)
    return program.parent


def line_in(environment: Path, search: str) -> str:
    """Return the line that an environment's Python makes with this PATH."""
    program = "from seqmill.base.commands import command; print(command('fetch', 'untrained:dnabert_s'))"
    made = paste(shlex.join([f"{environment}/python", "-c", program]), environment, PATH=search)
    assert made.returncode == 0, made.stderr
    return made.stdout.rstrip("\n")


def test_the_command_seqmill(tmp_path: Path) -> None:
    ours, others = make_environment(tmp_path / "ours"), make_environment(tmp_path / "others")
    search = f"{ours}:{others}:{WITHOUT_SEQMILL}"
    line = line_in(ours, search)
    assert line == "seqmill fetch untrained:dnabert_s"
    assert_works(line, tmp_path, PATH=search)
    # In another environment the command may be another version, with other packages.
    assert line_in(others, search) == f"{others}/python {SCRIPTS}/fetch_weights.py untrained:dnabert_s"


def test_the_python_of_the_path_is_the_one_that_the_environment_was_made_with(tmp_path: Path) -> None:
    """It is the same file, but it does not have the environment's packages."""
    ours, base = make_environment(tmp_path / "ours"), tmp_path / "base"
    base.mkdir()
    (base / "python").symlink_to(os.path.realpath(sys.executable))
    launcher = f"{SCRIPTS}/fetch_weights.py untrained:dnabert_s"
    (ours / "seqmill").unlink()
    line = line_in(ours, f"{base}:{ours}")
    assert line == f"{ours}/python {launcher}"
    assert_works(line, tmp_path, PATH=f"{base}:{ours}")
    assert line_in(ours, f"{ours}:{base}") == f"python {launcher}"


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
