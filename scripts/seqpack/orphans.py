"""SLURM jobs of a workflow that was killed: they go on without it, beside those of its next run."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

from seqpack.errors import SeqpackError

RUN_ID = re.compile(r"SLURM run ID: ([\w-]+)")
HEAD_CHARACTERS = 1 << 16  # Snakemake says the run's id before it submits the first job
WAIT_SECONDS = 300.0  # SLURM gives a job KillWait (30 s by default) to save what it has
POLL_SECONDS = 1.0


def cancel_orphans(folder: Path) -> list[str]:
    """Cancel the jobs that earlier runs of Snakemake in `folder` have left in SLURM; return when they have ended.

    To be called while Snakemake's lock on the folder is held: then no other run there is alive. The runs are
    known by the ids in Snakemake's own logs, which the SLURM plugin takes for the names of its jobs.

    Returns:
        The ids of the cancelled jobs; none where there is no SLURM.

    Raises:
        SeqpackError: jobs are left after 5 minutes.
    """
    runs = _runs_of(folder)
    if not runs or not shutil.which("squeue"):
        return []
    found = jobs = _jobs_of(runs)
    if jobs:
        subprocess.run(["scancel", *jobs], check=False)
    deadline = time.monotonic() + WAIT_SECONDS
    while jobs:
        if time.monotonic() > deadline:
            raise SeqpackError(
                f"SLURM jobs of an earlier run in this folder do not end: {' '.join(jobs)}; "
                "wait until squeue lists them no more, and run again"
            )
        time.sleep(POLL_SECONDS)
        jobs = _jobs_of(runs)
    return found


def _runs_of(folder: Path) -> list[str]:
    ids = []
    for log in (folder / ".snakemake/log").glob("*.snakemake.log"):
        with log.open(errors="replace") as file:
            ids += RUN_ID.findall(file.read(HEAD_CHARACTERS))
    return ids


def _jobs_of(runs: list[str]) -> list[str]:
    command = ["squeue", "--me", "--noheader", "--format=%F %j"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return sorted({job for job, name in map(str.split, listed) if name in runs})
