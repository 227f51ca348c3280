"""Python imports this module where its folder is on PYTHONPATH: a worker then stops itself once it has saved packs.

A test that disturbs a running worker finds it there, however fast the machine is. HOLD_FILE names a file with the
number of part files to save first; without the file, the worker is not stopped. With FAKE_GPUS, workers compute on the
CPU, see fake_gpus/sitecustomize.py.
"""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any


def hold_after_parts(number: int) -> None:
    """Send this process SIGSTOP after the rename of so many part files, as Python tells an audit hook (PEP 578)."""
    renamed = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal renamed
        if event == "os.rename" and os.fspath(arguments[1]).endswith(".part.h5"):
            renamed += 1
        elif event == "open" and renamed == number and str(arguments[0]).endswith("/parts"):  # its fsync follows
            renamed += 1  # but once
            os.kill(os.getpid(), signal.SIGSTOP)

    sys.addaudithook(hook)


if any(argument.endswith("/embed_shard.py") for argument in sys.orig_argv[1:3]):
    hold_file = Path(os.environ["HOLD_FILE"])
    if hold_file.exists():
        hold_after_parts(int(hold_file.read_text()))

if "FAKE_GPUS" in os.environ:
    runpy.run_path(str(Path(__file__).parents[1] / "fake_gpus/sitecustomize.py"))
