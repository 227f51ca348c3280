"""Runs the workflow on the test cluster and watches its jobs."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import h5py
import psutil
from cluster import Cluster

from pipeline import HELD, MODEL, REPOSITORY, SCRIPTS

SLUG = "untrained-esm2_t6_8M_UR50D"
WORKER = str(SCRIPTS / "embed_shard.py")
SNAKEMAKE = (str(Path(sys.executable).with_name("snakemake")), "--snakefile", str(REPOSITORY / "Snakefile"))
# The plugin first checks jobs after 40 s, and then less and less often; the tests need it sooner.
SOON = ("--slurm-init-seconds-before-status-checks", "8", "--latency-wait", "10")
NO_ACCOUNTING = ("--slurm-status-command", "squeue")


class Workflow:
    """The workflow in its own folder, with profiles/slurm; workers save every pack."""

    def __init__(self, cluster: Cluster, folder: Path, fasta: Path, shards: int = 4, **settings: object) -> None:
        self.cluster, self.folder, self.shards = cluster, folder, shards
        slug = Path(str(settings["model"])).stem if "model" in settings else SLUG
        self.results = folder / "results" / fasta.stem / slug
        self.logs = folder / "logs" / fasta.stem / slug
        self._settings = {"fasta": fasta, "model": MODEL, "shards": shards, "precision": "float32"}
        self._settings |= {"save_seconds": 0, "audit_seconds": 0, **settings}
        self.output, self.hold_file = folder.with_suffix(".out"), folder.with_suffix(".hold")
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir()

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start Snakemake with its output in `output`. Workers obey `hold_file`; see held/sitecustomize.py."""
        settings = [f"{key}={value}" for key, value in self._settings.items()]
        command = [*SNAKEMAKE, "--workflow-profile", str(REPOSITORY / "profiles/slurm"), *SOON, *NO_ACCOUNTING]
        command += [*arguments, "--config", *settings]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # as on a login node
        environment |= {"PYTHONPATH": HELD, "HOLD_FILE": str(self.hold_file), "FAKE_GPUS": "1"}
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        return self.process

    def finish(self, seconds: float = 300) -> int:
        """Wait until Snakemake ends and return its exit code."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended after {seconds:.0f} s:\n{self.said()}\n{self.cluster.logs()}") from None

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def run(self, *arguments: str) -> int:
        self.start(*arguments)
        return self.finish()

    def said(self) -> str:
        return self.output.read_text()

    def kill(self) -> None:
        """Kill Snakemake with SIGKILL, if it runs."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def kill_left(self) -> None:
        """Kill every process in the folder with SIGKILL, because SLURM forgets the jobs of a failed node."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.cwd() == str(self.folder):
                    process.kill()

    def status(self, rank: int) -> dict:
        return json.loads((self.results / f"shards/shard_{rank}-of-{self.shards}.status.json").read_text())

    def log(self, rank: int) -> str:
        return (self.logs / f"embed_shard_{rank}-of-{self.shards}.log").read_text()

    def device(self, rank: int) -> str:
        """Return the CUDA_VISIBLE_DEVICES of a shard's last worker."""
        return re.findall(r"INFO GPU (\S+), the only one visible", self.log(rank))[-1]

    def digest(self) -> str:
        return digest_of(self.results / "embeddings.h5")

    def workers(self) -> dict[int, psutil.Process]:
        """Return the running workers by rank, without their forks; fail if two workers compute one shard."""
        found: dict[int, tuple[int, psutil.Process]] = {}
        for process in psutil.process_iter():
            try:
                arguments = process.cmdline()
                if WORKER in arguments[1:2] and process.cwd() == str(self.folder):
                    found[process.pid] = int(arguments[arguments.index("--rank") + 1]), process
                    if process.ppid() in found:
                        del found[process.pid]
            except psutil.Error:
                continue
        ranks = [rank for rank, _ in found.values()]
        assert len(ranks) == len(set(ranks)), f"two workers on a shard: {sorted(ranks)}"
        return dict(found.values())

    def job(self, rank: int) -> str:
        """Return the id of the SLURM job that computes a shard now."""
        environment = self.workers()[rank].environ()
        if "SLURM_ARRAY_TASK_ID" in environment:  # one task of an array has the SLURM_JOB_ID of the whole array
            return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
        return environment["SLURM_JOB_ID"]

    def start_and_hold(self) -> dict[int, psutil.Process]:
        """Start Snakemake and return the workers by rank, each stopped after its first saved pack.

        Workers that start later are not stopped.
        """
        self.hold_file.write_text("1")
        self.start()

        def all_held() -> bool:
            assert self.running(), self.said()
            workers = self.workers().values()
            return [worker.status() for worker in workers] == [psutil.STATUS_STOPPED] * self.shards

        self.wait_until(all_held, "not all workers have saved a pack")
        self.hold_file.unlink()
        return self.workers()

    def wait_until(self, condition: Callable[[], bool], what_if_not: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (
                f"{what_if_not} after {seconds:.0f} s\n{self.said()}\n{self.cluster.logs()}"
            )
            time.sleep(0.2)


def digest_of(embeddings: Path) -> str:
    """Return the SHA-256 of the embeddings alone."""
    with h5py.File(embeddings) as file:
        return hashlib.sha256(file["embeddings"][:].tobytes()).hexdigest()
