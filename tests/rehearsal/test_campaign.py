"""The campaign on a GPU with CUDA replaced: its scripts run to their end, record what fails, resume, and make tables.

Every "GPU" figure here means nothing; the failures of FlashAttention 2 are those of tests/cuda_stand_in/flash_attn.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import REPOSITORY

STAND_IN = REPOSITORY / "tests/cuda_stand_in"
NO_INSTRUCTION = "CompilationError: at 1:0: no such instruction"
SMALL, FLAGSHIP = "esm2_t6_8M_UR50D", "esm2_t33_650M_UR50D"


def campaign(folder: Path, call: str, tests: str = "") -> str:
    """Run a call of the campaign; return what it prints."""
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": str(STAND_IN),
        "PATH": f"{os.environ['PATH']}:{STAND_IN}",
        "TMPDIR": str(folder),
        "OUT": str(folder / "out"),
        "GPU_CAMPAIGN": "tiny",
        "GPU_CAMPAIGN_PATIENCE": "100",
        "GPU_TESTS": tests,
        "CAMPAIGN_SECONDS": "1500",
        "OMP_NUM_THREADS": "1",
    }
    for name in ("CUDA_VISIBLE_DEVICES", "XDG_RUNTIME_DIR", "PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    command = ["bash", str(REPOSITORY / "benchmarks/gpu_campaign.sh"), call]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def steps_of(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text())["steps"]


def test_the_first_call_measures_every_switch_and_resumes(tmp_path: Path) -> None:
    tests = "tests/gpu/test_cuda_memory.py -k split"
    printed = campaign(tmp_path, "1", tests)
    assert "tests/gpu: 1 passed, 0 failed, 0 skipped, 0 not run." in printed
    steps = steps_of(tmp_path / "out/gpu.json")
    failed = {name: step["why"] for name, step in steps.items() if step["state"] == "failed"}
    # Triton's products don't run there, nor does flash-attn.
    products = {name for name in failed if name.endswith("eager triton")}
    others = failed.keys() - products
    assert products
    assert all("flash_attn_2" in name or name == "dnabert_s: profile" for name in others), failed
    assert {failed[name] for name in others} == {NO_INSTRUCTION}
    assert {step["state"] for step in steps.values()} == {"done", "failed"}
    kinds = [step["result"]["kind"] for step in steps.values() if step["state"] == "done"]
    assert set(kinds) == {"machine", "variant", "peer", "file", "profile"}
    assert kinds.count("peer") == 4
    for step in steps.values():
        result = step.get("result", {})
        if result.get("kind") == "variant":
            assert result["worst_cosine_to_float32"] > 0.999
            assert result["runner"]
        if result.get("kind") == "peer":
            assert result["worst_cosine_to_ours_in_float32"] > 0.999
    assert f"{SMALL}: FASTA to HDF5" in steps
    table = (tmp_path / "out/gpu.md").read_text()
    for heading in ("| model | precision |", "| model | peer |", "FASTA to HDF5", "| share | µs |", "Failed: "):
        assert heading in table
    assert FLAGSHIP in printed

    # As if the call had ended within the profile.
    record = json.loads((tmp_path / "out/gpu.json").read_text())
    profile = f"{FLAGSHIP}: profile"
    record["steps"][profile] = {"state": "left out", "why": "no time left"}
    (tmp_path / "out/gpu.json").write_text(json.dumps(record))
    printed = campaign(tmp_path, "1", tests)
    assert "tests/gpu: 1 passed, 0 failed, 0 skipped, 0 not run." in printed
    again = steps_of(tmp_path / "out/gpu.json")
    assert again.keys() == steps.keys()
    assert again[profile]["state"] == "done"
    for name, step in steps.items():
        if step["state"] == "done" and name != profile:
            assert again[name] == step  # not measured again


def test_the_second_call_puts_it_under_stress(tmp_path: Path) -> None:
    campaign(tmp_path, "2")
    steps = steps_of(tmp_path / "out/gpu-hard.json")
    states = {name: step["state"] for name, step in steps.items()}
    assert states.pop("a lease of a MIG instance") == "left out"
    assert set(states.values()) == {"done"}, steps
    results = {name: step["result"] for name, step in steps.items() if step["state"] == "done"}
    for name in ("1 and 2 ranks", "a kill in mid-pack", "2 workers on one GPU", "a lease by UUID"):
        assert results[name]["same_bits"] is True
    for how in ("limited by torch", "taken by another process"):
        assert results[f"out of memory, {how}"]["splits"] > 0


CAMPAIGN = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
from gpu_steps import CHILD, LeftOut, Record, Step, run_steps, supervise

def work(name):
    with open("begun", "a") as file:
        print(name, file=file)
    if name == "raises":
        raise type("OutOfResources", (Exception,), {{}})("out of resource: shared memory")
    if name == "crashes":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "hangs":
        time.sleep(1000)
    if name == "left out":
        raise LeftOut("MIG is off")
    return {{"of": name}}

def recover():
    if "breaks the device" in Path("begun").read_text().splitlines()[-1]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

path = Path("results.json")
names = ["first", "raises", "crashes", "hangs", "left out", "breaks the device", "last"]
steps = [Step(name, lambda name=name: work(name), 0.5 if name == "hangs" else 10.0) for name in names]
steps.append(Step("missing", lambda: work("missing"), 0.0, ("no_such_module",)))
steps.append(Step("long", lambda: work("long"), float(sys.argv[1])))
write_table = lambda results, path: path.write_text(str(len(results["steps"])))
if CHILD in os.environ:
    sys.exit(run_steps(Record(path, write_table), steps, recover))
supervise(path, 100, [sys.executable, *sys.argv])
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "campaign.py"
    path.write_text(CAMPAIGN.format(benchmarks=str(REPOSITORY / "benchmarks")))
    return path


def run(program: Path, *arguments: str) -> list[str]:
    """Run it; return the steps that were begun."""
    begun = program.with_name("begun")
    begun.unlink(missing_ok=True)
    subprocess.run([sys.executable, str(program), *arguments], cwd=program.parent, check=True, capture_output=True)
    return begun.read_text().splitlines()


def test_a_step_that_fails_does_not_end_the_campaign(program: Path) -> None:
    begun = run(program, "1000")
    assert begun == ["first", "raises", "crashes", "hangs", "left out", "breaks the device", "last"]
    steps = steps_of(program.with_name("results.json"))
    assert steps["first"]["result"] == {"of": "first"}
    assert steps["raises"]["why"] == "OutOfResources: out of resource: shared memory"
    assert steps["raises"]["frames"][-1].endswith("work")
    assert "signal 9" in steps["crashes"]["why"]
    assert "signal 9" in steps["hangs"]["why"]
    states = {name: step["state"] for name, step in steps.items()}
    assert states["left out"] == states["missing"] == states["long"] == "left out"
    assert steps["missing"]["why"] == "not installed: no_such_module"
    assert "no time left" in steps["long"]["why"]
    assert states["last"] == states["breaks the device"] == "done"

    assert run(program, "0") == ["left out", "long", "raises", "crashes", "hangs"]  # the failed ones last
    assert steps_of(program.with_name("results.json"))["long"]["state"] == "done"
