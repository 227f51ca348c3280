"""How every program responds to a termination signal, tested in a separate process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import SCRIPTS

PROGRAM = """
import os, signal, sys
from pathlib import Path
from seqmill.cli import program
from seqmill.base.files import whole_or_absent
def work():
    with whole_or_absent(Path(sys.argv[1])) as temporary:
        temporary.write_text("half")
        try:
            for number in sys.argv[2:]:
                os.kill(os.getpid(), int(number))
        finally:  # a second signal while the first one's cleaning up goes on
            for number in sys.argv[2:]:
                os.kill(os.getpid(), int(number))
sys.exit(program.exit_code_of(work, kept="parts are kept"))
"""
NAMES = ("SIGTERM", "SIGHUP", "SIGUSR1")


def run_program(*arguments: object, ignored: tuple[signal.Signals, ...] = ()) -> subprocess.CompletedProcess[str]:
    def ignore() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(SCRIPTS)},
        preexec_fn=ignore,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_lets_the_work_clean_up(name: str, tmp_path: Path) -> None:
    number = signal.Signals[name]
    done = run_program(tmp_path / "result", int(number))
    assert done.returncode == 128 + number
    (line,) = done.stderr.splitlines()
    assert line.endswith(f"ERROR stopped by {name}; parts are kept")
    assert list(tmp_path.iterdir()) == []


def test_ignored_signals_stay_ignored(tmp_path: Path) -> None:
    """SIGHUP is ignored under nohup."""
    done = run_program(tmp_path / "result", int(signal.SIGHUP), ignored=(signal.SIGHUP,))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "result").read_text() == "half"
