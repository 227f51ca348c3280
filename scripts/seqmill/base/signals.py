"""What asks a program to stop: signals, and the death of its parent."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5


class Interrupted(SystemExit):
    """A signal asked the program to stop; the exit code is 128 + its number, as shells count."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.signal_name = signal.Signals(signal_number).name

    def __str__(self) -> str:
        return f"stopped by {self.signal_name}"


@contextmanager
def held_back_signals() -> Iterator[None]:
    """Call the handlers of signals that come while the block runs when it has ended.

    Handlers run in the main thread; elsewhere there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in Signals.NUMBERS}
    held = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in held:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


class Signals:
    """Turns the signals that ask a process to stop into `Interrupted`, while it is wanted.

    SIGUSR1 is what SLURM can be told to send some time before a job's limit.

    Args:
        numbers: which signals.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self, numbers: Sequence[int] = NUMBERS) -> None:
        self.received = 0
        self._numbers = numbers
        self._previous: dict[int, Any] = {}

    def catch(self) -> None:
        for number in self._numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, which is to be obeyed
                self._previous[number] = signal.signal(number, self._interrupt)

    def ignore(self) -> None:
        """Let a second signal not disturb the writing of the status."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise again what was received: an exception is lost that arises inside one of h5py's callbacks."""
        if self.received:
            raise Interrupted(self.received)

    def _interrupt(self, number: int, frame: object) -> None:
        if not self.received:  # a further one would only disturb what the first has set going
            self.received = number
            raise Interrupted(number)


def stop_with_parent(pid: int) -> None:
    """Send this process SIGTERM when the process `pid` or its own parent ends, so that it is no orphan.

    A workflow that is killed leaves its children running: the shell in between goes on waiting, or is
    killed in its turn. Such a worker would write beside its successor.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and is_alive(pid):
            time.sleep(POLL_SECONDS)
        log.error("the process that started this one (%d) has ended: stopping", pid)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended does not, though its parent has not noticed yet."""
    try:
        os.kill(pid, 0)
        stat = Path("/proc", str(pid), "stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return not Path("/proc/self").exists()  # without /proc the parent alone is watched
    except PermissionError:
        return True
    return stat.rpartition(")")[2].split()[0] != "Z"
