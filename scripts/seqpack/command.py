"""What every command-line program does alike: log first, one clear error, an exit code."""

from __future__ import annotations

import errno
import logging
import math
import os
import resource
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable

from seqpack.errors import SeqpackError
from seqpack.interrupts import Interrupted

log = logging.getLogger("seqpack")


def start_log() -> None:
    """Send log lines to standard error; a workflow redirects that to the rule's log file."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )


def run(work: Callable[[], object]) -> int:
    """Do the work and return the program's exit code.

    A SeqpackError or an error of the operating system (disk full, no permission) is told in one line;
    anything else is a defect of seqpack and keeps its traceback.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a merge maps every shard: 1024 would not do for many
    try:
        work()
    except SeqpackError as error:
        log.error("%s", error)
        return 1
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        log.error("%s%s", error, "; make room and run again: finished parts are kept" if full else "")
        return 1
    except Interrupted as stop:
        log.error("%s; what was finished is saved", stop)
        logging.shutdown()
        os._exit(stop.code)  # at once: threads may be in the midst of minutes of work that no one awaits
    return 0


def at_least(minimum: int) -> Callable[[str], int]:
    """Return an argparse type: an integer not below `minimum`."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < minimum:
            raise ArgumentTypeError(f"{value} is below {minimum}")
        return value

    return integer


def seconds(text: str) -> float:
    """Argparse type: a number of seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not 0 <= value < math.inf:
        raise ArgumentTypeError(f"{text} is not a number of seconds from 0 on")
    return value
