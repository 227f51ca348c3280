"""Steps of a campaign: each result is saved at once, a failure is recorded, and a later call goes on after them.

A step that raises, hangs, or crashes must not end the campaign, and after some failures a process can't use the GPU
any more. So the steps run in a child process, and the parent starts another one then.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from traceback import extract_tb

CHILD = "GPU_CAMPAIGN_END"  # set for the child: when the call must end, in seconds since the epoch
DONE, FAILED, LEFT_OUT, RUNNING = "done", "failed", "left out", "running"
AGAIN = 3  # exit status of a child that is to be followed by another
PATIENCE = float(os.environ.get("GPU_CAMPAIGN_PATIENCE", "4"))
SHOWN = 400  # characters of a failure
FRAMES = 8  # of its traceback


class LeftOut(Exception):
    """Says why a step can't be done on this machine."""


@dataclass(frozen=True)
class Step:
    """A measurement.

    Attributes:
        name: by which a later call recognizes it.
        work: returns the figures.
        seconds: the time that it usually takes; it does not start with less left, and is ended after PATIENCE times it.
        needs: modules that must be installed.
    """

    name: str
    work: Callable[[], dict]
    seconds: float
    needs: tuple[str, ...] = ()


class Record:
    """The results so far, in a JSON file: `steps` has for each name its state, and its result or the reason."""

    def __init__(self, path: Path, write_table: Callable[[dict, Path], None]) -> None:
        self.path, self._write_table = path, write_table
        self.results: dict = json.loads(path.read_text()) if path.exists() else {"steps": {}}

    @property
    def steps(self) -> dict[str, dict]:
        return self.results["steps"]

    def note(self, name: str, state: str, **facts: object) -> None:
        self.steps[name] = {"state": state, **facts}
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1, default=str) + "\n")
        temporary.replace(self.path)
        self._write_table(self.results, self.path.with_suffix(".md"))


def one_line(error: BaseException) -> str:
    """Return the kind of an exception and its message, of which compilers write pages."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:SHOWN]


def run_steps(record: Record, steps: Sequence[Step], recover: Callable[[], object]) -> int:
    """Run the steps that are not done, and those last that failed in an earlier call; return the exit status.

    `recover` frees what a step has left behind; it raises if this process can't use the device any more.
    """
    end = float(os.environ[CHILD])
    tried = record.results.setdefault("tried", [])  # in this call; the parent empties it
    earlier = [step for step in steps if record.steps.get(step.name, {}).get("state") == FAILED]
    for step in [*(step for step in steps if step not in earlier), *earlier]:
        if step.name in tried or record.steps.get(step.name, {}).get("state") == DONE:
            continue
        if missing := [name for name in step.needs if find_spec(name) is None]:
            record.note(step.name, LEFT_OUT, why=f"not installed: {', '.join(missing)}")
            continue
        if time.time() + step.seconds > end:
            if step not in earlier:
                record.note(step.name, LEFT_OUT, why="no time left; call again with the same output")
            continue
        tried.append(step.name)
        _run(record, step, end)
        try:
            recover()
        except Exception as error:
            print(f"after {step.name}: {one_line(error)}", file=sys.stderr)
            return AGAIN
    return 0


def _run(record: Record, step: Step, end: float) -> None:
    record.note(step.name, RUNNING, kill_at=min(time.time() + PATIENCE * step.seconds, end))
    start = time.perf_counter()
    try:
        result = step.work()
        facts: dict = {"state": DONE, "result": result}
    except LeftOut as reason:
        facts = {"state": LEFT_OUT, "why": str(reason)}
    except Exception as error:  # Triton's own are no RuntimeErrors
        frames = [
            f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in extract_tb(error.__traceback__)
        ]
        facts = {"state": FAILED, "why": one_line(error), "frames": frames[-FRAMES:]}
    facts["seconds"] = round(time.perf_counter() - start, 1)
    record.note(step.name, **facts)
    line = f"{facts['state']} {facts.get('why', '')}".strip()
    print(f"{end - time.time():4.0f} s left | {step.name}: {line}", file=sys.stderr, flush=True)


def supervise(path: Path, seconds: float, command: Sequence[str]) -> None:
    """Run a child that runs the steps, and another one whenever it ends before they are done."""
    end = time.time() + seconds
    _change(path, lambda results: results.update(tried=[]))
    while time.time() < end:
        child = subprocess.Popen(command, env={**os.environ, CHILD: str(end)})
        status = _watch(child, path, end)
        unfinished = _end_running(path, status, end)
        if status == 0 or (status != AGAIN and not unfinished):
            break  # all is done, or it can't even start


def _watch(child: subprocess.Popen, path: Path, end: float) -> int:
    """Wait for a child; kill it at the end of the call, or if a step takes too long."""
    while child.poll() is None:
        running = [step for step in _read(path)["steps"].values() if step["state"] == RUNNING]
        if time.time() > min([end, *(step["kill_at"] for step in running)]):
            child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.5)
    return child.returncode


def _end_running(path: Path, status: int, end: float) -> bool:
    """Note the step during which a child ended; return whether there was one."""
    found = [name for name, step in _read(path)["steps"].items() if step["state"] == RUNNING]
    for name in found:
        how = f"its process was ended by signal {-status}" if status < 0 else f"its process ended with {status}"
        step = {"state": FAILED, "why": f"{how}, after a crash or because it took too long"}
        if time.time() >= end:
            step = {"state": LEFT_OUT, "why": "no time left; call again with the same output"}
        _change(path, lambda results, name=name, step=step: results["steps"].update({name: step}))
    return bool(found)


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {"steps": {}}


def _change(path: Path, change: Callable[[dict], None]) -> None:
    results = _read(path)
    change(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
