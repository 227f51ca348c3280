"""Runs workers as a workflow does, and computes the digest of their embeddings."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import h5py

from pipeline import SCRIPTS, SUPPORT, Run, run_script
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.packing import packs_of_rank
from seqmill.store.index import open_index
from seqmill.store.part_file import open_part
from seqmill.store.status import COMPLETE, read_status

FAULTS = Path(__file__).parent
PROGRAM = SCRIPTS / "embed_shard.py"
SETTINGS = ("--device", "cpu", "--precision", "float32", "--audit-seconds", "0")
EACH_PACK = ("--save-seconds", "0")


@dataclass(frozen=True)
class Undisturbed:
    """A run without any fault.

    Attributes:
        fasta, model, policy, index: what every run starts from.
        digest: SHA-256 of the embeddings.
        seconds: wall time of one of its two workers, from the start of Python to its end.
        compute_seconds: how many of these seconds the packs took.
    """

    fasta: Path
    model: str
    policy: LengthPolicy
    index: Path
    digest: str
    seconds: float
    compute_seconds: float

    def again(self, folder: Path, world_size: int) -> Run:
        """Return a new run of the same index in a folder, or resume the run there with another world size."""
        folder.mkdir(exist_ok=True)
        run = Run(folder, world_size)
        if not run.index.exists():
            shutil.copy(self.index, run.index)
        return run


def arguments_of(run: Run, rank: int, *more: object) -> list[str]:
    return [
        *("--index", str(run.index), "--rank", str(rank), "--world-size", str(run.world_size)),
        *("--output", str(run.shards[rank]), "--status", str(run.statuses[rank]), *SETTINGS, *map(str, more)),
    ]


def start(run: Run, rank: int, *more: object, before: str = "", **options: object) -> subprocess.Popen[str]:
    """Start a worker and do not wait for it; its process first runs the Python statements `before`."""
    program = f"import runpy, sys; {before}\nrunpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    if before:
        options["env"] = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    command = [sys.executable, *(("-c", program) if before else (str(PROGRAM),)), *arguments_of(run, rank, *more)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **options)  # type: ignore[call-overload]


def die_at(moment: str, run: Run, rank: int, *more: object) -> None:
    """Run a worker that is killed at a moment of die_at.py."""
    command = [sys.executable, str(FAULTS / "die_at.py"), moment, *arguments_of(run, rank, *more)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(SUPPORT), str(SCRIPTS)))}
    died = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr


def embed(run: Run, rank: int, *more: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a worker to its end."""
    return run_script(PROGRAM.name, *arguments_of(run, rank, *more), **options)


def status_of(run: Run, rank: int = 0) -> dict:
    return json.loads(run.statuses[rank].read_text())


def parts_in(run: Run) -> list[Path]:
    return sorted((run.folder / "parts").glob("*.part.h5"))


def packs_done(run: Run) -> int:
    """Return how many packs a new run can reuse, from parts or from complete shards of another world size."""
    packs = {pack for path in parts_in(run) for pack in open_part(path).packs.tolist()}
    for path in run.folder.glob("shard_*-of-*.status.json"):
        status = read_status(path)
        if status.status == COMPLETE and status.world_size != run.world_size:
            packs.update(packs_of_rank(open_index(run.index).num_packs, status.rank, status.world_size))
    return len(packs)


def digest_of(embeddings: Path) -> str:
    with h5py.File(embeddings) as file:
        return hashlib.sha256(file["embeddings"][:].tobytes()).hexdigest()


def finish(run: Run) -> tuple[str, int]:
    """Finish every rank and merge; return the digest, and how many packs were not computed again."""
    run.embed().merge()
    return digest_of(run.embeddings), sum(status_of(run, rank)["resumed_packs"] for rank in range(run.world_size))


def left_behind(folder: Path) -> list[str]:
    """Return everything below a folder that a merge should have removed: temporary files, locks, parts."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.name.endswith((".tmp", ".lock", ".part.h5", ".damaged")) or path.name == "parts"
    )
