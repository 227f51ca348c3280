"""SLURM jobs of a workflow that was killed: they go on without it, beside those of its next run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from seqmill.base.locks import try_lock
from seqmill.errors import SeqmillError

RUN_ID = re.compile(r"SLURM run ID: ([\w-]+)")
HEAD_CHARACTERS = 1 << 16  # Snakemake says the run's id before it submits the first job
RUNS = 100  # of how many earlier runs jobs are looked for
WAIT_SECONDS = 300.0  # SLURM gives a job KillWait (30 s by default) to save what it has
POLL_SECONDS = 1.0
CLAIM_SECONDS = 10.0
CLAIM_POLL_SECONDS = 0.05
SHOWN_COMMAND = 80  # characters
IN_USE = ".snakemake/seqmill.running"  # locked while a run lives; says which folder it is, and since when


def claim_folder(folder: Path) -> tuple[IO[str], bool]:
    """Mark a working folder as in use until the returned file is closed, by the end of the process at the latest.

    Snakemake's own lock is on files: two runs of different datasets may share a folder.

    Returns:
        The file, and whether no other live run uses the folder; False as well where that can't be told.

    Raises:
        SeqmillError: another process keeps the folder for itself.
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
    if alone and where != str(folder.resolve()):  # new, or a copy, whose logs tell of the original's runs
        file.truncate(0)
        file.write(f"{folder.resolve()}\n{time.time() if where else 0}\n")
        file.flush()
    return file, alone


def _share(file: IO[str], path: Path) -> None:
    """Take the shared lock. Runs hold the exclusive one for a moment only, unless they are stopped at it."""
    deadline = time.monotonic() + CLAIM_SECONDS
    while try_lock(file, shared=True) is False:
        if time.monotonic() > deadline:
            raise SeqmillError(
                f"{path}: is locked by {_holders(file)}; end it and run again: without this lock another run "
                "could cancel the SLURM jobs of this one"
            )
        time.sleep(CLAIM_POLL_SECONDS)


def _holders(file: IO[str]) -> str:
    """Name the processes of this machine that hold the exclusive lock, which the kernel lists by device and inode."""
    state = os.fstat(file.fileno())
    place = f"{os.major(state.st_dev):02x}:{os.minor(state.st_dev):02x}:{state.st_ino}"
    names = []
    with suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()  # 1: FLOCK ADVISORY WRITE 4711 08:01:131073 0 EOF
            if fields[1] == "FLOCK" and fields[3] == "WRITE" and fields[5] == place:
                words = Path("/proc", fields[4], "cmdline").read_bytes().decode(errors="replace").split("\0")
                names.append(f"process {fields[4]} ({' '.join(words).strip()[:SHOWN_COMMAND]})")
    return ", ".join(names) or "a process that this machine can't name, perhaps on another"


def cancel_orphans(folder: Path) -> list[str]:
    """Cancel the jobs that earlier runs of Snakemake in `folder` have left in SLURM; return when they have ended.

    To be called when no other run there is alive, see `claim_folder`. The runs are known by the ids in
    Snakemake's own logs, which the SLURM plugin takes for the names of its jobs.

    Returns:
        The ids of the cancelled jobs; none where there is no SLURM.

    Raises:
        SeqmillError: SLURM does not answer, or jobs are left after 5 minutes.
    """
    runs = _runs_of(folder)
    if not runs or not shutil.which("squeue"):
        return []
    deadline = time.monotonic() + WAIT_SECONDS
    found = jobs = _jobs_of(runs, deadline)
    while jobs:
        subprocess.run(["scancel", *jobs], check=False)  # again each time: it may have failed
        time.sleep(POLL_SECONDS)
        jobs = _jobs_of(runs, deadline)
        if jobs and time.monotonic() > deadline:
            raise SeqmillError(
                f"SLURM jobs of an earlier run in this folder do not end: {' '.join(jobs)}; "
                "wait until squeue lists them no more, and run again"
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
