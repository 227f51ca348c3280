"""A GPU of one's own: workers on one machine each take another of the visible devices."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from seqpack.devices import visible_gpus

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.5


@contextmanager
def leased_gpu() -> Iterator[str | None]:
    """Hold one of the visible GPUs and make it the only visible one; to be called before torch is imported.

    The lease is a lock on a file in a folder of this machine, so the kernel ends it however the process
    ends. With one visible GPU, or none, there is nothing to choose and nothing is locked. Waits while all
    are taken.

    Yields:
        The device's index or UUID; None if nothing had to be leased.
    """
    gpus = visible_gpus()
    if len(gpus) < 2:
        if gpus:
            log.info("GPU %s, the only one visible", gpus[0])
        yield None
        return
    # Indices are a node's own, and under SLURM a job's own.
    owner = f"{os.getuid()}-{socket.gethostname()}-{os.environ.get('SLURM_JOB_ID', '')}".rstrip("-")
    folder = Path(tempfile.gettempdir()) / f"seqpack-gpus-{owner}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with ExitStack() as stack:
        files = {gpu: stack.enter_context((folder / f"{gpu.replace('/', '_')}.lock").open("w")) for gpu in gpus}
        gpu = _first_free(files)
        if gpu is None:
            log.info("all %d GPUs are taken (%s); waiting for one", len(gpus), folder)
        while gpu is None:
            time.sleep(WAIT_SECONDS)
            gpu = _first_free(files)
        if "CUDA_VISIBLE_DEVICES" not in os.environ:
            os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # nvidia-smi's order, from which the index comes
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        log.info("GPU %s of %s", gpu, ", ".join(gpus))
        try:
            yield gpu
        finally:
            log.info("GPU %s is free again", gpu)


def _first_free(files: dict[str, IO[str]]) -> str | None:
    for gpu, file in files.items():
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return gpu
        except BlockingIOError:
            continue
    return None
