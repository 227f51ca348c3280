#!/usr/bin/env python3
"""Put seqmill on this machine's GPU under stress: little memory, leases, eight workers, and a kill in mid-pack.

Every step compares its embeddings with those of an undisturbed run, bit for bit. Like `gpu.py`, it writes each result
at once and goes on where an earlier call stopped.

    python benchmarks/gpu_hard.py --output benchmarks/results/gpu-hard
"""

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

BENCHMARKS = Path(__file__).parent
sys.path[:0] = [str(BENCHMARKS.parent / "scripts")]

from gpu_steps import CHILD, DONE, FAILED, LEFT_OUT, LeftOut, Record, Step, run_steps, supervise

NEEDS = ("h5py", "msgspec")
SPARE_BYTES = (0.4e9, 0.7e9, 1.1e9, 1.6e9)  # a pack of the model takes about 1e9, by an estimate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=560.0, help="end after this time (default: 560)")
    parser.add_argument("--output", type=Path, required=True, help="writes OUTPUT.md and OUTPUT.json")
    arguments = parser.parse_args()
    path = arguments.output.with_suffix(".json")
    if CHILD in os.environ:
        with tempfile.TemporaryDirectory(prefix="seqmill-hard-") as folder:
            sys.exit(run_steps(Record(path, write_table), list(steps(Path(folder))), lambda: None))
    supervise(path, arguments.seconds, [sys.executable, *sys.argv])
    print(lines_of(Record(path, write_table).results))


def steps(folder: Path) -> Iterator[Step]:
    from gpu_runs import Runs
    from gpu_sizes import SIZES

    runs, workers = Runs(folder), SIZES.hard_workers
    for name, work, seconds in (
        (f"1 and {SIZES.hard_ranks} ranks", functools.partial(ranks, number=SIZES.hard_ranks), 60.0),
        ("a kill in mid-pack", killed, 60.0),
        ("out of memory, limited by torch", functools.partial(short_of_memory, how="fraction"), 50.0),
        ("out of memory, taken by another process", functools.partial(short_of_memory, how="ballast"), 60.0),
        (f"{workers} workers on one GPU", functools.partial(at_once, number=workers), 90.0),
        ("a lease by UUID", by_uuid, 40.0),
        ("a lease of a MIG instance", by_mig, 40.0),
    ):
        yield Step(name, functools.partial(work, runs), seconds, NEEDS)


def ranks(runs: "Runs", number: int) -> dict:  # noqa: F821
    """Compute with one rank and with several."""
    return {"same_bits": runs.same_bits("ranks", number)}


def killed(runs: "Runs") -> dict:  # noqa: F821
    """Kill a worker when it has saved some packs but not all, and run it again."""
    for attempt in range(3):  # a busy machine may notice the first saved pack too late
        folder = runs.new(f"killed-{attempt}", 1)
        worker = runs.start(folder, 0, 1, "--save-seconds", "0")
        while not (parts := list(folder.glob("parts/*.part.h5"))) and worker.poll() is None:
            time.sleep(0.002)
        worker.kill()
        worker.communicate()
        if worker.returncode >= 0:
            continue
        status = runs.finish(folder, 0, 1)
        resumed, packs = status["resumed_packs"], status["num_packs"]
        if not resumed:
            raise ValueError(f"none of {packs} packs was resumed after {len(parts)} part files")
        if resumed < packs:
            return {"same_bits": runs.merged_alike(folder, 1), "resumed_packs": resumed, "packs": packs}
    raise LeftOut("the worker had saved all packs before it could be killed")


def short_of_memory(runs: "Runs", how: str) -> dict:  # noqa: F821
    """Leave the worker too little memory for a pack: by torch's limit, or because another process has the rest."""
    for spare in SPARE_BYTES:  # the first with which it can run: CUDA's own share is not known
        folder = runs.new(f"{how}-{spare:.0e}", 1)
        try:
            with runs.little_memory(how, spare) as environment:
                status = runs.finish(folder, 0, 1, environment=environment)
        except ValueError as error:
            failure = error
        else:
            break
    else:
        raise failure
    splits = status["run"]["out_of_memory_splits"]
    if not splits:
        raise ValueError("no pack was split: the limit left too much memory")
    difference = runs.difference(folder, 1)
    if difference > 1e-2:
        raise ValueError(f"the embeddings differ by {difference:.1e}")
    return {
        "spare_bytes": spare,
        "splits": splits,
        "sequences_on_cpu": status["run"]["sequences_on_cpu"],
        "worst_difference": difference,
    }


def at_once(runs: "Runs", number: int) -> dict:  # noqa: F821
    """Start workers at once; they take turns, or share the GPU."""
    folder, began = runs.new("at-once", number), time.perf_counter()
    workers = [runs.start(folder, rank, number) for rank in range(number)]
    ended = [worker.communicate()[1] for worker in workers]
    for worker, errors in zip(workers, ended, strict=True):
        if worker.returncode:
            raise ValueError(errors.strip().splitlines()[-1] if errors.strip() else f"ended with {worker.returncode}")
    seconds = time.perf_counter() - began
    return {"same_bits": runs.merged_alike(folder, number), "seconds": seconds, "waited": "waiting" in "".join(ended)}


def by_uuid(runs: "Runs") -> dict:  # noqa: F821
    """Show the worker its GPU by UUID."""
    return leased(runs, "uuid", listed_devices(r"\(UUID: (GPU-[^)]+)\)"), "nvidia-smi -L lists no UUID")


def by_mig(runs: "Runs") -> dict:  # noqa: F821
    """Show the worker a MIG instance, if the GPU is divided; MIG itself stays as it is."""
    return leased(runs, "mig", listed_devices(r"\(UUID: (MIG-[^)]+)\)"), "MIG is off")


def leased(runs: "Runs", name: str, devices: list[str], reason: str) -> dict:  # noqa: F821
    if not devices:
        raise LeftOut(reason)
    folder = runs.new(name, 1)
    status = runs.finish(folder, 0, 1, environment={"CUDA_VISIBLE_DEVICES": devices[0]})
    found = status["run"]["device_uuid"]
    if name == "uuid" and found.removeprefix("GPU-") != devices[0].removeprefix("GPU-"):
        raise ValueError(f"asked for {devices[0]}, computed on {found}")
    return {"same_bits": runs.merged_alike(folder, 1), "asked": devices[0], "device_uuid": found}


def listed_devices(pattern: str) -> list[str]:
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except OSError as error:
        raise LeftOut(f"nvidia-smi can't be run: {error.strerror}") from None
    return re.findall(pattern, answer.stdout)


def lines_of(results: dict) -> str:
    """Return a line for each step."""
    lines = []
    for name, step in results["steps"].items():
        facts = "; ".join(f"{key} {value}" for key, value in step.get("result", {}).items())
        lines.append(f"- {step['state']}: {name}: {facts or step.get('why', '')}")
    states = [step["state"] for step in results["steps"].values()]
    lines.append("\n" + ", ".join(f"{states.count(state)} {state}" for state in (DONE, FAILED, LEFT_OUT)))
    return "\n".join(lines)


def write_table(results: dict, path: Path) -> None:
    path.write_text(lines_of(results) + "\n")


if __name__ == "__main__":
    main()
