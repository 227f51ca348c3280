"""Run a program in this process, which sends itself a signal: signal_at.py SIGNAL EVENT PATTERN COUNT PROGRAM ARGS...

Python calls an audit hook (PEP 578) just before it opens, renames or removes a file. The signal is sent at the
COUNT-th EVENT whose path (for a rename: the new path) matches PATTERN.
"""

import os
import re
import runpy
import signal
import sys
from typing import Any


def main() -> None:
    name, wanted, pattern, count, program, *arguments = sys.argv[1:]
    number, left = signal.Signals[name], [int(count)]
    if number == signal.SIGINT:  # a shell starts background processes with SIGINT ignored
        signal.signal(number, signal.default_int_handler)

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if event != wanted or not left[0]:
            return
        path = values[1 if event == "os.rename" else 0]
        if isinstance(path, str | os.PathLike) and re.search(pattern, os.fspath(path)):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), number)

    sys.argv = [program, *arguments]
    sys.addaudithook(hook)
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
