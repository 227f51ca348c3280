"""Run a program in this process, which sends itself a signal: signal_at.py SIGNAL EVENT PATTERN COUNT PROGRAM ARGS...

Python tells an audit hook (PEP 578) of every file just before it opens, renames or removes it. The signal is sent at
the COUNT-th such event whose file's path (of a rename the new one) has the pattern.
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
    if number == signal.SIGINT:  # a shell lets what it runs in the background ignore it
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
