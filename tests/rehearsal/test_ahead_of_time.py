"""Machine code of every Triton kernel, as the models launch it, for five kinds of GPU; the compiler needs no GPU.

`python -m pytest tests/rehearsal --all-kernels` compiles every launch of every model for all of them.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from fake_cuda import Launch, fake_cuda
from fake_models import all_ways, fake_pack
from pipeline import SCRIPTS
from seqmill.model.elementwise import TRITON

HERE = Path(__file__).parent
NEXT_TRITON = HERE.parent.parent / ".venv-triton-3.9.0"  # another version than the installed one, see Makefile
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # that one block can have
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
REGISTERS = 65536  # of a multiprocessor
FLOAT8_CAPABILITY = 89
# Bytes of stack for spilled registers, by kernel and dtype: they cost time, no correctness. The second is fc1 of 15B.
SPILLS = {("biased_triton._attention", "float32"): 16, ("float8_triton._round", "bfloat16"): 32}
PARTS = 4  # processes for a kind of GPU
EXTREMES = ("esm2_t6_8M_UR50D", "esm2_t48_15B_UR50D", "esmc_6b", "prott5_xl_u50", "dnabert_s")
USUAL = ("esm2_t33_650M_UR50D", "esmc_300m", "prott5_xl_u50", "dnabert_s")


@functools.cache
def launches(capability: int, models: tuple[str, ...], dtypes: tuple[str, ...]) -> list[Launch]:
    """Return the different launches of some models; without models or dtypes, of all."""
    found: set[Launch] = set()
    with pytest.MonkeyPatch.context() as patch, fake_cuda(patch, capability) as counted:
        for way in all_ways():
            if way.elementwise != TRITON or (models and way.model not in models):
                continue
            kind = str(way.dtype).removeprefix("torch.")
            if (dtypes and kind not in dtypes) or (kind.startswith("float8") and capability < FLOAT8_CAPABILITY):
                continue
            way.embedder(way.all_outputs, num_layers=2)(fake_pack([352] * 93))
        found.update(counted.triton)
    return sorted(found, key=repr)


def check(found: list[Launch], capability: int, folder: Path, packages: Path | None = None) -> None:
    """Compile launches; each must fit the GPU, keep its registers, and use tensor cores for 16-bit products."""
    (folder / "launches.json").write_text(json.dumps([vars(launch) for launch in found]))
    path = os.pathsep.join(map(str, [*([packages] if packages else []), SCRIPTS]))
    command = [sys.executable, HERE / "compile_launches.py", "launches.json", str(capability), "compiled.json"]
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads((folder / "compiled.json").read_text())
    print(f"Triton {answer['triton']}, sm_{capability}")
    wrong = []
    for launch, code in zip(found, answer["kernels"], strict=True):
        print(launch.module, launch.kernel, [value for _, value in launch.arguments], code)
        if faults := faults_of(launch, code, capability):
            wrong.append(f"{launch}: {', '.join(faults)}: {code}")
    assert not wrong, "\n".join(wrong)
    version = (packages / "triton/__init__.py").read_text() if packages else ""
    assert not packages or f"'{answer['triton']}'" in version


def faults_of(launch: Launch, code: dict[str, Any], capability: int) -> list[str]:
    dtypes = [value[1] for _, value in launch.arguments if isinstance(value, tuple)]
    allowed = SPILLS.get((f"{launch.module}.{launch.kernel}", dtypes[0]), 0)
    has_tensor_cores = bool(code[TENSOR_CORES[capability]])
    faults = {
        "registers spill": code["stack"] > allowed or bool((code["LDL"] or code["STL"]) and not allowed),
        "too much shared memory": code["shared"] > SHARED_BYTES[capability],
        "too many registers": code["registers"] * 32 * code["warps"] > REGISTERS,
        "no tensor cores": code["dots"] and dtypes[0] in ("bfloat16", "float16") and not has_tensor_cores,
    }
    return [fault for fault, is_so in faults.items() if is_so]


def part_of(found: list[Launch], part: int) -> list[Launch]:
    return found[part::PARTS]


@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_of_the_smallest_and_largest_models_in_every_precision(part: int, tmp_path: Path) -> None:
    check(part_of(launches(90, EXTREMES, ()), part), 90, tmp_path)


@pytest.mark.parametrize("capability", [80, 86, 100, 120])
def test_kernels_for_other_gpus(capability: int, tmp_path: Path) -> None:
    kinds = ("bfloat16", "float8_e4m3fn")
    check(launches(capability, USUAL, kinds), capability, tmp_path)


@pytest.mark.parametrize("capability", [90, 120])
def test_kernels_by_the_next_triton(capability: int, tmp_path: Path) -> None:
    if not NEXT_TRITON.exists():
        pytest.skip(f"no {NEXT_TRITON.name}: make rehearse installs it where it can be downloaded")
    check(launches(capability, USUAL, ("bfloat16",)), capability, tmp_path, NEXT_TRITON)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("capability", list(SHARED_BYTES))
def test_every_kernel_for_every_gpu(capability: int, part: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--all-kernels"):
        pytest.skip("--all-kernels")
    check(part_of(launches(capability, (), ()), part), capability, tmp_path)


def test_faults_are_noticed(tmp_path: Path) -> None:
    """The test of the tests above: more warps than registers, and tensor cores that are not there."""
    launch = next(launch for launch in launches(90, ("dnabert_s",), ("bfloat16",)) if launch.kernel == "_attention")
    code = {"registers": 255, "warps": 16, "stack": 8, "LDL": 1, "STL": 1, "shared": 1 << 20, "dots": True, "HGMMA": 0}
    assert len(faults_of(launch, code, 90)) == 4
