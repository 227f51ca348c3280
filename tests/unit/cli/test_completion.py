"""Completion in real shells: bash and zsh read the script, and get a Tab on a terminal."""

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import SCRIPTS
from seqmill.cli.main import COMMANDS
from seqmill.spec.lengths import LONG_SEQUENCES

PATIENCE_SECONDS = 30.0  # for answers that must come; none takes this long
# Each shell without the user's settings, and how it reads the script in a file `_seqmill`.
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "bind 'set show-all-if-ambiguous on'; source ./_seqmill"),
    "zsh": (["zsh", "-f", "-i"], "fpath=($PWD $fpath); autoload -U compinit; compinit -u -d ./dump"),
}


class Shell:
    """An interactive shell on a pseudoterminal, in a folder with two FASTA files."""

    def __init__(self, name: str, folder: Path) -> None:
        if not shutil.which(name):
            pytest.skip(f"{name} is not installed")
        command = [sys.executable, "-m", "seqmill", "completion", name]
        made = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, check=True)
        assert made.stderr == ""
        (folder / "_seqmill").write_text(made.stdout)
        for file in ("proteins_of_maize.faa", "proteins_of_rice.faa"):
            (folder / file).touch()
        command, settings = SHELLS[name]
        self.process, self.terminal = pty.fork()
        if self.process == 0:
            os.chdir(folder)
            os.execvpe(command[0], command, {**os.environ, "PS1": "$ ", "TERM": "dumb", "HOME": str(folder)})
        self.send(f"{settings}; echo rea''dy\n")
        self.read_until("ready")

    def send(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def read_until(self, *expected: str) -> str:
        """Return what the shell writes until it has written all that is expected."""
        said, deadline = "", time.monotonic() + PATIENCE_SECONDS
        while not all(text in said for text in expected):
            assert time.monotonic() < deadline, f"{expected} not in {said!r}"
            if select.select([self.terminal], [], [], 0.1)[0]:
                said += os.read(self.terminal, 4096).decode()
        return said

    def close(self) -> None:
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.terminal)


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest, tmp_path: Path):
    shell = Shell(request.param, tmp_path)
    yield shell
    shell.close()


def test_the_one_subcommand_that_fits_is_written(shell: Shell) -> None:
    shell.send("seqmill f\t")
    shell.read_until("fetch ")


def test_subcommands_are_listed(shell: Shell) -> None:
    shell.send("seqmill \t")
    shell.read_until(*COMMANDS)


def test_choices_are_listed(shell: Shell) -> None:
    shell.send("seqmill index --long-sequences \t")
    shell.read_until("auto", *LONG_SEQUENCES)


def test_options_are_listed(shell: Shell) -> None:
    shell.send("seqmill shard --s\t")
    shell.read_until("--status", "--save-seconds")


@pytest.mark.parametrize("before", ["index --fasta", "run"])
def test_files_are_completed(shell: Shell, before: str) -> None:
    shell.send(f"seqmill {before} proteins_of_m\t")
    shell.read_until("proteins_of_maize.faa")
