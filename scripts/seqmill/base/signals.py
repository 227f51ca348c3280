"""Stopping a program: by a signal, or because its parent has ended."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from seqmill.base.machine import PROC

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5


class Interrupted(SystemExit):
    """A signal asked the program to stop; the exit code is 128 + its number, as shells count."""

    code: int

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.signal_name = signal.Signals(signal_number).name

    def __str__(self) -> str:
        return f"stopped by {self.signal_name}"


@contextmanager
def held_back_signals() -> Iterator[None]:
    """Delay the handlers of signals that arrive during the block until it ends.

    Handlers run only in the main thread, so in other threads this does nothing.
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
        for late in came:
            signal.raise_signal(late)


class Signals:
    """Turns the signals that ask a process to stop into `Interrupted`, from `catch` to `restore`.

    SLURM can be told to send SIGUSR1 some time before a job's limit.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self, numbers: Sequence[int] = NUMBERS) -> None:
        self.received = 0
        self._numbers = numbers
        self._previous: dict[int, Any] = {}

    def catch(self) -> None:
        for number in self._numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:  # obey nohup, which ignores SIGHUP
                self._previous[number] = signal.signal(number, self._interrupt)

    def ignore(self) -> None:
        """Ignore further signals, so that they don't disturb the writing of the status."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise `Interrupted` again if a signal arrived: exceptions inside h5py's callbacks are lost."""
        if self.received:
            raise Interrupted(self.received)

    def _interrupt(self, number: int, frame: object) -> None:
        if not self.received:  # a second signal would only disturb the shutdown
            self.received = number
            raise Interrupted(number)


def stop_with_parent(pid: int) -> None:
    """Send this process SIGTERM when process `pid` or its own parent ends.

    The children of a killed workflow go on: the shell in between keeps waiting, or is killed as well. Such an orphan
    would write to the same shard as its successor.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and is_alive(pid):
            time.sleep(POLL_SECONDS)
        log.error("the process that started this one (%d) has ended: stopping", pid)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def is_alive(pid: int) -> bool:
    """Return whether a process of this machine runs; a zombie does not, if /proc tells."""
    try:
        os.kill(pid, 0)
    except PermissionError:  # it is another user's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except OSError:  # it has just ended, or there is no /proc, as on macOS
        return not (PROC / "self").exists()
    return stat.rpartition(")")[2].split()[0] != "Z"
