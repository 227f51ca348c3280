"""SLURM jobs that a killed workflow has left: they compute the same shards as its next run."""

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from seqmill.base.locks import try_lock
from seqmill.errors import SeqmillError

RUN_ID = re.compile(r"SLURM run ID: ([\w-]+)")
HEAD_CHARACTERS = 1 << 16  # of a log; Snakemake writes the run's id before it submits the first job
RUNS = 100  # the latest runs whose jobs are searched
WAIT_SECONDS = 300.0  # SLURM gives a job KillWait (30 s by default) to save its packs
POLL_SECONDS = 1.0
CLAIM_SECONDS, CLAIM_POLL_SECONDS = 10.0, 0.05
SHOWN_COMMAND = 80  # characters
IN_USE = ".snakemake/seqmill.running"  # locked while a run is alive; holds the folder's path and a time


def stop_orphans(folder: Path) -> IO[str]:
    """Claim a folder and cancel the SLURM jobs of killed runs there; return and raise as the functions below."""
    in_use, alone = claim_folder(folder)
    if jobs := cancel_orphans(folder) if alone else []:
        print(f"Cancelled SLURM jobs of an earlier run in this folder: {' '.join(jobs)}", file=sys.stderr)
    return in_use


def claim_folder(folder: Path) -> tuple[IO[str], bool]:
    """Mark a working folder as in use until the returned file is closed, or the process ends.

    Snakemake locks files, not folders: two runs of different datasets may share a folder. Return the file, and
    whether no other live run uses the folder; False as well if that is unknown. Raise a SeqmillError if another
    process holds the exclusive lock.
    """
    path = folder / IN_USE
    path.parent.mkdir(exist_ok=True)
    file = path.open("a+")
    try:
        alone = try_lock(file) is True
        _share(file, path)
    except OSError:
        alone = False
    file.seek(0)
    where = file.readline().strip()
    if alone and where != str(folder.resolve()):  # new, or a copy with the logs of the original's runs
        file.truncate(0)
        file.write(f"{folder.resolve()}\n{time.time() if where else 0}\n")
        file.flush()
    return file, alone


def _share(file: IO[str], path: Path) -> None:
    """Take the shared lock. A run holds the exclusive one only for a moment, unless it is suspended then."""
    deadline = time.monotonic() + CLAIM_SECONDS
    while try_lock(file, shared=True) is False:
        if time.monotonic() > deadline:
            raise SeqmillError(
                f"{path}: is locked by {_holders(file)}; end it and run again: without this lock another run "
                "could cancel this run's SLURM jobs"
            )
        time.sleep(CLAIM_POLL_SECONDS)


def _holders(file: IO[str]) -> str:
    """Name the processes of this machine that hold the exclusive lock; the kernel lists locks by device and inode."""
    state = os.fstat(file.fileno())
    place = f"{os.major(state.st_dev):02x}:{os.minor(state.st_dev):02x}:{state.st_ino}"
    names = []
    with suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()  # 1: FLOCK ADVISORY WRITE 4711 08:01:131073 0 EOF
            if fields[1] == "FLOCK" and fields[3] == "WRITE" and fields[5] == place:
                words = Path("/proc", fields[4], "cmdline").read_bytes().decode(errors="replace").split("\0")
                names.append(f"process {fields[4]} ({' '.join(words).strip()[:SHOWN_COMMAND]})")
    return ", ".join(names) or "a process that is not listed here, perhaps on another machine"


def cancel_orphans(folder: Path) -> list[str]:
    """Cancel the SLURM jobs of earlier runs in a folder, and wait for their end.

    No other run there may be alive, see `claim_folder`. Snakemake's logs hold the ids of its runs, and the SLURM
    plugin names the jobs after them. Return the ids of the cancelled jobs; none without SLURM. Raise a SeqmillError
    if SLURM does not answer, or jobs are left after 5 minutes.
    """
    runs = _runs_of(folder)
    if not runs or not shutil.which("squeue"):
        return []
    deadline = time.monotonic() + WAIT_SECONDS
    found = jobs = _jobs_of(runs, deadline)
    while jobs:
        subprocess.run(["scancel", *jobs], check=False)  # each time, as it may have failed
        time.sleep(POLL_SECONDS)
        jobs = _jobs_of(runs, deadline)
        if jobs and time.monotonic() > deadline:
            raise SeqmillError(
                f"SLURM jobs of an earlier run in this folder do not end: {' '.join(jobs)}; "
                "wait until squeue no longer lists them, and run again"
            )
    return found


def _runs_of(folder: Path) -> list[str]:
    logs = sorted((folder / ".snakemake/log").glob("*.snakemake.log"))[-RUNS:]  # their names begin with the time
    try:
        since = float((folder / IN_USE).read_text().splitlines()[1])
    except (OSError, ValueError, IndexError):
        since = 0.0
    ids = []
    for log in (log for log in logs if log.stat().st_mtime >= since):
        with log.open(errors="replace") as file:
            ids += RUN_ID.findall(file.read(HEAD_CHARACTERS))
    return ids


def _jobs_of(runs: list[str], deadline: float) -> list[str]:
    command = ["squeue", "--me", "--noheader", f"--name={','.join(runs)}", "--format=%F"]
    while (answer := subprocess.run(command, capture_output=True, text=True, check=False)).returncode:
        if time.monotonic() > deadline:
            raise SeqmillError(f"squeue fails: {answer.stderr.strip()}; jobs of an earlier run may be left: run again")
        time.sleep(POLL_SECONDS)
    return sorted(set(answer.stdout.split()))
