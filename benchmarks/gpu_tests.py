#!/usr/bin/env python3
"""Run tests/gpu within a time limit, in parallel if pytest-xdist is installed; a later call runs those not yet passed.

    python benchmarks/gpu_tests.py --output benchmarks/results/gpu-tests --seconds 230

As a plugin of pytest (-p gpu_tests) this module writes each test's result to a file at once.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
LOG = "GPU_TESTS_LOG"  # a file with a line of JSON for each result
WORKERS = str(min(6, os.cpu_count() or 1))
NEEDED = ("pytest", "numpy", "torch", "h5py", "msgspec")
SHOWN = 20


def pytest_collection_modifyitems(items: list) -> None:
    """Drop the tests that passed before."""
    passed = {name for name, outcome in read(Path(os.environ[LOG])).items() if outcome["outcome"] == "passed"}
    items[:] = [item for item in items if item.nodeid not in passed]


def pytest_collection_finish(session: object) -> None:
    """Note the tests that are to run as not run yet; of pytest-xdist's workers, the first does."""
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
        write(Path(os.environ[LOG]), *({"test": item.nodeid, "outcome": "not run"} for item in session.items))


def pytest_runtest_logreport(report: object) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    why = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr or "")
    last = why.strip().splitlines()[-1:] or [""]
    outcome = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2), "why": last[0]}
    write(Path(os.environ[LOG]), outcome)


def read(log: Path) -> dict[str, dict]:
    """Return the last outcome of each test."""
    lines = log.read_text().splitlines() if log.exists() else []
    return {outcome["test"]: outcome for outcome in map(json.loads, lines)}


def write(log: Path, *outcomes: dict) -> None:
    with log.open("a") as file:
        file.writelines(f"{json.dumps(outcome)}\n" for outcome in outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=230.0, help="end after this time (default: 230)")
    parser.add_argument("--output", type=Path, required=True, help="writes OUTPUT.md and OUTPUT.jsonl")
    arguments = parser.parse_args()
    log = arguments.output.with_suffix(".jsonl").resolve()
    log.parent.mkdir(parents=True, exist_ok=True)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        said = f"tests/gpu was left out; not installed: {', '.join(missing)}"
    else:
        run(log, arguments.seconds)
        said = summary(read(log))
    arguments.output.with_suffix(".md").write_text(said + "\n")
    print(said)


def run(log: Path, seconds: float) -> None:
    chosen = os.environ.get("GPU_TESTS", "tests/gpu").split()  # arguments of pytest
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "--continue-on-collection-errors",
        "-p",
        "gpu_tests",
        "-p",
        "no:cacheprovider",
        *chosen,
    ]
    if find_spec("xdist"):
        command += ["-n", WORKERS, "--dist", "worksteal"]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, LOG: str(log), "PYTHONPATH": path}
    with log.with_suffix(".log").open("w") as output:
        session = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            session.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(session.pid, signal.SIGKILL)  # its results are in the file
            session.wait()


def summary(outcomes: dict[str, dict]) -> str:
    kinds = [outcome["outcome"] for outcome in outcomes.values()]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("passed", "failed", "skipped", "not run"))
    failed = [f"{name}: {outcome['why']}" for name, outcome in outcomes.items() if outcome["outcome"] == "failed"]
    more = [f"and {len(failed) - SHOWN} more"] if len(failed) > SHOWN else []
    return "\n".join([f"tests/gpu: {counts}.", *(f"Failed: {name}" for name in failed[:SHOWN]), *more])


if __name__ == "__main__":
    main()
