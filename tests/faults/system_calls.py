"""Faults at a program's system calls, and a server that runs a program with a fault."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import SCRIPTS

HERE = Path(__file__).parent
# Kinds of calls, and what may happen at one, in the same order as in fault_at.c.
CALLS = ("open", "write", "fsync", "rename", "unlink", "truncate", "allocate", "mkdir", "close")
ACTIONS = ("none", "fail", "fail_on", "half", "die", "die_after")
DIE = ("die", 0)
FULL, BROKEN, FORBIDDEN = errno.ENOSPC, errno.EIO, errno.EACCES
DISTURBANCES: dict[str, tuple[tuple[str, int], ...]] = {
    "open": (("fail", FORBIDDEN), ("fail", BROKEN), DIE),
    "write": (("fail", BROKEN), ("fail_on", FULL), ("half", 0), DIE, ("die_after", 0)),
    "fsync": (("fail", BROKEN), ("fail", FULL), DIE),
    "rename": (("fail", FORBIDDEN), ("fail", BROKEN), DIE, ("die_after", 0)),
    "unlink": (("fail", FORBIDDEN), DIE, ("die_after", 0)),
    "truncate": (("fail", BROKEN), ("fail_on", FULL), DIE),
    "allocate": (("fail", FULL), DIE),
    "mkdir": (("fail", FORBIDDEN), ("fail", FULL), DIE, ("die_after", 0)),
    "close": (("fail", BROKEN), ("fail", FULL), DIE),
}


@dataclass(frozen=True)
class Fault:
    """What happens at call `number` (from 1) of a kind."""

    call: str
    number: int
    action: str = "none"
    error: int = 0

    @property
    def kills(self) -> bool:
        return self.action in ("die", "die_after")

    def __str__(self) -> str:
        what = f"{self.action} {errno.errorcode[self.error]}" if self.error else self.action
        return f"{self.call} {self.number}: {what}"


NO_FAULT = Fault("open", 0)


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        code: the exit code, or minus the number of the signal.
        log: what the program wrote to standard output and error.
        counts: the number of calls of each kind on files in the folder.
        path: the path of the disturbed call; empty if there were fewer calls.
    """

    code: int
    log: str
    counts: dict[str, int]
    path: str


class Server:
    """A process that has imported what programs need, and forks to run one.

    Args:
        library: fault_at.so.
        folder: calls on files in it count; must exist, and its path must have no links.
        log: where the programs' messages go; not in `folder`.
        modules: the modules to import first.
    """

    def __init__(self, library: Path, folder: Path, log: Path, modules: Sequence[str]) -> None:
        self._folder, self._log = folder, log
        environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(SCRIPTS)}
        # A forked child does not have its parent's threads.
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "program_server.py"), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, script: str, arguments: Sequence[object], fault: Fault = NO_FAULT) -> Ended:
        """Run a program of scripts/ with a fault."""
        request = {
            "script": str(SCRIPTS / script),
            "arguments": list(map(str, arguments)),
            "folder": str(self._folder),
            "log": str(self._log),
            "fault": (CALLS.index(fault.call), fault.number, ACTIONS.index(fault.action), fault.error),
            "kinds": len(CALLS),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        counts = dict(zip(CALLS, answer["counts"], strict=True))
        return Ended(answer["code"], self._log.read_text(errors="replace"), counts, answer["path"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc"))


def compile_library(folder: Path) -> Path:
    """Compile fault_at.c with the system's compiler."""
    library = folder / "fault_at.so"
    command = [compiler(), "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, HERE / "fault_at.c", "-ldl"]
    subprocess.run(list(map(str, command)), check=True)
    return library
