"""The workflow on a real SLURM cluster gives the same result, whatever happens to its jobs."""

import re
import subprocess
import time
from pathlib import Path

import torch
from cluster import GPUS, Cluster
from cluster_workflow import SNAKEMAKE, Workflow, digest_of

from pipeline import DEMO, Run
from reference import fair_esm_model, save_checkpoint
from seqmill.spec.models import MODELS
from sequences import random_sequences

CYSTEINE = 23  # the token


def test_the_demo_is_an_array_of_four_jobs_each_with_a_gpu(cluster: Cluster, tmp_path: Path) -> None:
    """All four run at once, which avoids the plugin's bug with arrays (see the profile)."""
    workflow = Workflow(cluster, tmp_path / "work", DEMO)
    assert workflow.run("--slurm-array-jobs", "embed_shard", "--latency-wait", "120") == 0, workflow.said()
    assert re.search(r"Submitted array job .* The individual task IDs are 1-4\.", workflow.said())
    assert {workflow.device(rank) for rank in range(4)} == set(map(str, range(GPUS)))
    assert workflow.digest() == digest_of(Run(tmp_path, 1).build(DEMO).embed().merge().embeddings)
    assert {workflow.status(rank)["attempt"] for rank in range(4)} == {1}


def test_cancelled_requeued_and_timed_out_jobs_resume(workflow: Workflow, local_digest: str) -> None:
    """Each worker saves its finished packs, and the shard's next worker resumes from them."""
    cluster = workflow.cluster
    workers = workflow.start_and_hold()
    jobs = {rank: workflow.job(rank) for rank in range(4)}
    # The worker of rank 2 stays stopped, so it reaches its time limit; SLURM counts whole minutes.
    workers[3].resume()
    cluster.control("scontrol", "update", f"jobid={jobs[2]}", "TimeLimit=1")
    cluster.control("scancel", jobs[0])
    cluster.control("scontrol", "requeue", jobs[1])
    workflow.wait_until(lambda: not (workers[0].is_running() or workers[1].is_running()), "the workers live on")
    assert workflow.log(1).rstrip().endswith("stopped by SIGTERM; finished packs are saved")
    assert workflow.status(1)["error"] == {"type": "Interrupted", "message": "stopped by SIGTERM"}
    # SLURM makes a requeued job wait two minutes.
    cluster.wait_until(lambda: cluster.state(jobs[1]) == "PENDING", "the requeued job does not wait")
    cluster.control("scontrol", "update", f"jobid={jobs[1]}", "StartTime=now")
    assert workflow.finish() == 0, workflow.said()
    assert workflow.digest() == local_digest
    said = workflow.said()
    assert "SLURM status is: 'CANCELLED'" in said
    assert "SLURM status is: 'TIMEOUT'" in said
    assert [workflow.status(rank)["attempt"] for rank in range(4)] == [2, 1, 2, 1]  # a SLURM requeue isn't an attempt
    for rank in range(3):
        assert workflow.status(rank)["resumed_packs"] > 0
    assert workflow.status(3)["resumed_packs"] == 0
    # The next attempt asks for more time and memory. (The log of the failed attempt repeats its request.)
    request = r"rank=0,.*\n    threads: 2\n    resources: .*mem_mb=(\d+).* runtime=(\d+).* attempt=(\d)"
    asked = re.findall(request, said)
    (memory, minutes, first), (more_memory, more_minutes, second) = sorted(set(asked), key=lambda values: values[-1])
    assert (first, second) == ("1", "2")
    assert int(memory) < int(more_memory)
    assert int(minutes) < int(more_minutes)


def test_a_job_over_its_memory_is_ended_and_asks_for_more(cluster: Cluster, tmp_path: Path) -> None:
    workflow = Workflow(cluster, tmp_path / "work", DEMO, shards=1)
    few_then_enough = "embed_shard:mem_mb=300 if attempt == 1 else 4000"
    # --set-resources on the command line replaces the profile's set-resources.
    assert workflow.run("--set-resources", few_then_enough, "embed_shard:gpu=1") == 0, workflow.said()
    slurm_logs = "\n".join(path.read_text() for path in (workflow.folder / "logs/slurm").rglob("*.log"))
    assert re.search(r"exceeded memory limit", slurm_logs), slurm_logs
    assert workflow.status(0)["attempt"] == 2
    assert workflow.digest() == digest_of(Run(tmp_path, 1).build(DEMO).embed().merge().embeddings)


def test_a_drained_node_that_returns(workflow: Workflow, local_digest: str) -> None:
    """A drained node takes no new jobs: running jobs continue, and the retry of a cancelled job waits."""
    cluster = workflow.cluster
    workers = workflow.start_and_hold()
    cancelled = workflow.job(0)
    cluster.control("scontrol", "update", f"nodename={cluster.host}", "state=drain", "reason=test")
    try:
        cluster.control("scancel", cancelled)
        for rank in range(1, 4):
            workers[rank].resume()
        workflow.wait_until(lambda: cluster.node_state() == "drained", "the node has jobs still")
        workflow.wait_until(lambda: list(cluster.jobs().values()) == ["PENDING"], "no job waits for the node")
        assert {rank: workflow.status(rank)["status"] for rank in range(1, 4)} == dict.fromkeys(range(1, 4), "complete")
    finally:
        cluster.control("scontrol", "update", f"nodename={cluster.host}", "state=resume")
    assert workflow.finish() == 0, workflow.said()
    assert workflow.digest() == local_digest
    assert workflow.status(0)["attempt"] == 2
    assert workflow.status(0)["resumed_packs"] > 0


def test_a_node_that_fails(workflow: Workflow, local_digest: str) -> None:
    """SLURM requeues the node's jobs; Snakemake does not count them as new attempts."""
    cluster = workflow.cluster
    workflow.start_and_hold()
    cluster.control("scontrol", "update", f"nodename={cluster.host}", "state=down", "reason=test")
    # Wait until all job processes have ended; SLURM does not wait for a node that it thinks is dead.
    workflow.wait_until(lambda: not cluster.has_job_processes(), "the jobs live on")
    # No check, because the node may have returned by itself.
    cluster.control("scontrol", "update", f"nodename={cluster.host}", "state=resume", check=False)
    assert set(cluster.jobs().values()) == {"PENDING"}
    for job in cluster.jobs():
        cluster.control("scontrol", "update", f"jobid={job}", "StartTime=now")
    assert workflow.finish() == 0, workflow.said()
    assert workflow.digest() == local_digest
    assert [workflow.status(rank)["attempt"] for rank in range(4)] == [1, 1, 1, 1]
    assert all(workflow.status(rank)["resumed_packs"] > 0 for rank in range(4))


def test_a_shard_that_always_fails_leads_to_its_cause(cluster: Cluster, tmp_path: Path) -> None:
    model = fair_esm_model(MODELS["esm2_t6_8M_UR50D"])
    with torch.no_grad():
        model.embed_tokens.weight[CYSTEINE] = float("nan")
    checkpoint = save_checkpoint(model, tmp_path / "nan.pt")
    # Packs have two sequences, in descending length, so the one with C is in pack 1 and rank 1.
    sequences = [s.replace("C", "A") for s in random_sequences([500, 490, 480, 470, 460, 450])]
    sequences[3] = f"C{sequences[3][1:]}"
    fasta = tmp_path / "six.faa"
    fasta.write_text("".join(f">id{n}\n{s}\n" for n, s in enumerate(sequences)))
    workflow = Workflow(cluster, tmp_path / "work", fasta, shards=2, model=checkpoint)
    assert workflow.run() != 0
    said = workflow.said()
    assert workflow.status(0)["status"] == "complete"
    assert (workflow.results / "shards/shard_0-of-2.h5").exists()
    assert not (workflow.results / "embeddings.h5").exists()
    status = workflow.status(1)
    assert (status["status"], status["attempt"]) == ("failed", 3)  # the profile sets two retries
    assert "no finite embedding" in status["error"]["message"]
    assert "'id3' (record 4)" in status["error"]["message"]
    # Snakemake's output names both files and shows the cause.
    assert "results/six/nan/shards/shard_1-of-2.status.json" in said
    assert "logs/six/nan/embed_shard_1-of-2.log" in said
    assert "'id3' (record 4)" in said


def test_a_killed_workflow_starts_again_and_no_shard_is_computed_twice(workflow: Workflow, local_digest: str) -> None:
    """Snakemake is killed and its jobs continue; the next run cancels them before it submits new ones."""
    workflow.start_and_hold()
    workflow.kill()
    assert set(workflow.workers()) == set(range(4))  # SLURM does not know that Snakemake is dead
    subprocess.run([*SNAKEMAKE, "--unlock", "--cores", "1"], check=True, capture_output=True, cwd=workflow.folder)
    workflow.start()
    while workflow.running():
        workflow.workers()  # fails if two workers compute one shard
        time.sleep(0.1)
    assert workflow.finish() == 0, workflow.said()
    assert "Cancelled SLURM jobs of an earlier run in this folder" in workflow.said()
    assert workflow.digest() == local_digest
    assert all(workflow.status(rank)["resumed_packs"] > 0 for rank in range(4))
