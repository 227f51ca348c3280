"""Snakemake is killed, or one of its workers; shards that fail once, or always."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from workers import PROGRAM, Undisturbed, digest_of, left_behind

from pipeline import MODEL, REPOSITORY
from reference import fair_esm_model, save_checkpoint
from seqmill import open_embeddings
from seqmill.spec.models import MODELS
from sequences import random_sequences

SLUG = "untrained-esm2_t6_8M_UR50D"
CYSTEINE = 23  # the token


class Workflow:
    """The workflow on a FASTA, in two shards that save each pack."""

    def __init__(self, folder: Path, fasta: Path, model: str = MODEL, slug: str = SLUG) -> None:
        self.folder, self.results = folder, folder / "results" / fasta.stem / slug
        self.logs = folder / "logs" / fasta.stem / slug
        self._settings = {"fasta": fasta, "model": model, "shards": 2, "device": "cpu", "precision": "float32"}
        self._settings |= {"save_seconds": 0, "audit_seconds": 0}
        folder.mkdir()

    def command(self, *arguments: str, **settings: object) -> list[str]:
        """Return the command line; the profile is the default one, next to the Snakefile."""
        all_settings = [f"{key}={value}" for key, value in (self._settings | settings).items()]
        snakemake = str(Path(sys.executable).with_name("snakemake"))
        places = ["--snakefile", str(REPOSITORY / "Snakefile"), "--directory", str(self.folder)]
        return [snakemake, *places, "--cores", "2", *arguments, "--config", *all_settings]

    def start(self) -> subprocess.Popen[str]:
        pipe, one = subprocess.PIPE, subprocess.STDOUT
        return subprocess.Popen(self.command(), cwd=REPOSITORY, stdout=pipe, stderr=one, text=True)

    def run(self, *arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
        command = self.command(*arguments, **settings)
        one = subprocess.STDOUT
        return subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=one, text=True, check=False)

    def status(self, rank: int) -> dict:
        return json.loads((self.results / f"shards/shard_{rank}-of-2.status.json").read_text())

    def processes(self) -> list[psutil.Process]:
        """Return every process that runs in the workflow's folder or names it in its command line."""
        found = []
        for process in psutil.process_iter():
            try:
                where = [process.cwd(), *process.cmdline()]
            except psutil.Error:
                continue
            if process.pid != os.getpid() and any(str(self.folder) in text for text in where):
                found.append(process)
        return found

    def wait_for_parts(self, snakemake: subprocess.Popen[str], number: int = 2) -> tuple[psutil.Process, int]:
        """Return the worker and its rank once it has saved `number` packs; each takes all cores, so only one runs."""
        while len(list((self.results / "shards/parts").glob("*.part.h5"))) < number:
            assert snakemake.poll() is None, snakemake.stdout and snakemake.stdout.read()
            time.sleep(0.02)
        workers = [p for p in self.processes() if str(PROGRAM) in p.cmdline()]
        assert len(workers) == 1, workers
        arguments = workers[0].cmdline()
        return workers[0], int(arguments[arguments.index("--rank") + 1])

    def all_gone(self, within: float = 20.0) -> bool:
        deadline = time.monotonic() + within
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return not left


def test_a_killed_workflow_leaves_no_orphan_and_resumes(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """kill -9 of Snakemake: its worker saves its packs and exits; after --unlock the next run resumes."""
    workflow = Workflow(tmp_path / "work", undisturbed.fasta)
    snakemake = workflow.start()
    worker, rank = workflow.wait_for_parts(snakemake)
    worker.suspend()  # or it might finish before it checks for its parent, twice a second
    snakemake.kill()
    snakemake.wait()
    time.sleep(1)
    worker.resume()
    snakemake.communicate()  # the worker holds the other end of the pipe
    assert workflow.all_gone(), workflow.processes()
    status = workflow.status(rank)
    assert status["error"] == {"type": "Interrupted", "message": "stopped by SIGTERM"}
    assert not (workflow.results / "embeddings.h5").exists()
    locked = workflow.run()
    assert locked.returncode != 0
    assert "--unlock" in locked.stdout
    unlocked = workflow.run("--unlock")
    assert unlocked.returncode == 0, unlocked.stdout
    again = workflow.run()
    assert again.returncode == 0, again.stdout
    assert digest_of(workflow.results / "embeddings.h5") == undisturbed.digest
    assert workflow.status(rank)["resumed_packs"] == status["done_packs"] >= 2
    assert left_behind(workflow.results) == []


def test_a_killed_worker_is_run_again_and_resumes(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """kill -9 of a worker: `retries` runs its shard again, which resumes. No shell between them could die instead."""
    workflow = Workflow(tmp_path / "work", undisturbed.fasta)
    snakemake = workflow.start()
    worker, rank = workflow.wait_for_parts(snakemake)
    assert worker.ppid() == snakemake.pid  # the rule's shell has become the worker
    worker.send_signal(signal.SIGKILL)
    output, _ = snakemake.communicate(timeout=300)
    assert snakemake.returncode == 0, output
    assert digest_of(workflow.results / "embeddings.h5") == undisturbed.digest
    assert workflow.status(rank)["attempt"] == 2
    assert workflow.status(rank)["resumed_packs"] >= 2
    assert workflow.status(1 - rank)["attempt"] == 1
    assert workflow.all_gone(), workflow.processes()
    assert left_behind(workflow.results) == []


def test_a_shard_that_always_fails(tmp_path: Path) -> None:
    """One sequence without a finite embedding fails only its shard, and the error names it; skip leaves it out."""
    model = fair_esm_model(MODELS["esm2_t6_8M_UR50D"])
    with torch.no_grad():
        model.embed_tokens.weight[CYSTEINE] = float("nan")
    checkpoint = save_checkpoint(model, tmp_path / "nan.pt")
    # Two sequences per pack, in descending length: rank 0 has packs 0 and 2, and the sequence with C is in pack 1.
    sequences = [s.replace("C", "A") for s in random_sequences([500, 490, 480, 470, 460, 450])]
    sequences[3] = sequences[3][:100] + "C" + sequences[3][101:]
    fasta = tmp_path / "six.faa"
    fasta.write_text("".join(f">id{n}\n{s}\n" for n, s in enumerate([*sequences, sequences[3], sequences[0]])))
    workflow = Workflow(tmp_path / "work", fasta, str(checkpoint), "nan")

    failed = workflow.run()
    assert failed.returncode != 0
    good, bad = workflow.status(0), workflow.status(1)
    assert good["status"] == "complete"
    assert (workflow.results / "shards/shard_0-of-2.h5").exists()
    assert bad["status"] == "failed"
    assert bad["attempt"] == 3  # the profile's two retries
    assert "1 sequence has no finite embedding, in float32 either: 'id3' (record 4)" in bad["error"]["message"]
    assert "'id3' (record 4)" in failed.stdout
    assert "results/six/nan/shards/shard_1-of-2.status.json" in failed.stdout
    assert "logs/six/nan/embed_shard_1-of-2.log" in failed.stdout
    assert "Traceback" not in failed.stdout
    assert not (workflow.results / "embeddings.h5").exists()

    skipped = workflow.run(on_error="skip")
    assert skipped.returncode == 0, skipped.stdout
    assert re.search(r"^QUARANTINED: 2 records of six ", skipped.stdout, re.MULTILINE)
    assert workflow.status(0)["ended"] == good["ended"]  # not run again
    embeddings = open_embeddings(workflow.results / "embeddings.h5")
    assert embeddings.ids == ["id0", "id1", "id2", "id4", "id5", "id7"]
    assert (embeddings["id7"] == embeddings["id0"]).all()
    with gzip.open(workflow.results / "records.tsv.gz", "rt") as table:
        header, *rows = (line.rstrip("\n").split("\t") for line in table)
    fates = {row[header.index("id")]: row[header.index("fate")] for row in rows}
    assert fates == {
        **dict.fromkeys(("id0", "id1", "id2", "id4", "id5"), "embedded"),
        **dict.fromkeys(("id3", "id6"), "quarantined"),
        "id7": "duplicate",
    }
    counts = json.loads((workflow.results / "manifest.json").read_text())["counts"]
    assert {fate: number for fate, number in counts["fates"].items() if number} == {
        **{"embedded": 5, "duplicate": 1, "quarantined": 2}
    }
    assert sum(counts["fates"].values()) == counts["num_records"] == 8
    assert len(embeddings) + counts["fates"]["quarantined"] == counts["num_records"]
    assert left_behind(workflow.results) == []
