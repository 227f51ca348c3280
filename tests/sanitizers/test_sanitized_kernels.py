"""The C kernels' tests pass with AddressSanitizer and UndefinedBehaviorSanitizer compiled into the kernels.

The emulator of AMX tiles is compiled with them as well, so that the tiles' loads and stores are checked.
gcc does not instrument masked vector loads and stores; `tests/unit/model/test_kernel_bounds.py` covers those.
"""

import os
import shutil
import subprocess
import sys

import pytest

from pipeline import REPOSITORY, SCRIPTS, SUPPORT
from seqmill.base.machine import processor
from seqmill.model.kernels.build import KERNELS

RUNNABLE = [name for name, kernel in KERNELS.items() if kernel.features <= processor()[1]]
TESTS = ["test_attention.py", "test_alibi_kernels.py", "test_elementwise.py", "test_amx.py"]
TESTS += ["test_cpu_relative.py", "test_cpu_qk_norm.py", "test_cpu_rms_silu.py"]
# -O1, because gcc takes minutes for -O3 with sanitizers.
FLAGS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"


def runtime(name: str) -> str:
    """Return the path of a library of gcc's; empty if it isn't installed."""
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if "/" in found else ""


pytestmark = [
    pytest.mark.skipif(not RUNNABLE, reason="no kernel for this processor"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python process that compiles its kernels with the sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    # The processes of pytest-xdist compile each kernel once together.
    cache = folder.parent.parent / "cache" if "PYTEST_XDIST_WORKER" in os.environ else folder / "cache"
    compiler = folder / "cc"
    compiler.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec gcc "$@" {FLAGS}\n')
    compiler.chmod(0o755)
    # Without libstdc++, AddressSanitizer would abort at PyTorch's first exception.
    libraries = [runtime("libasan.so"), runtime("libstdc++.so")]
    if not all(libraries):
        pytest.skip("gcc's libasan is not installed")
    return {
        **os.environ,
        "CC": str(compiler),
        "XDG_CACHE_HOME": str(cache),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and PyTorch free little at exit
        "PYTHONPATH": f"{SCRIPTS}:{SUPPORT}",
    }


# Calls a kernel with one array too short, or at an odd address.
CODE = """
import ctypes, sys
import torch
from seqmill.model.kernels import compiled
kernel, case = sys.argv[1:]
dtype = compiled.KERNELS[kernel].dtype
arrays = {
    "qkv": torch.zeros(53, 3, 2, 16, dtype=dtype),
    "cosines": torch.zeros(33, 16),
    "sines": torch.zeros(33, 16),
    "starts": torch.tensor([0, 33]),
    "lengths": torch.tensor([33, 20]),
    "output": torch.zeros(53, 2, 16, dtype=dtype),
}
if case in arrays:
    arrays[case] = arrays[case][:-1].clone()
pointers = {name: array.data_ptr() + (case == f"{name} at an odd address") for name, array in arrays.items()}
*inputs, output = map(ctypes.c_void_p, pointers.values())
status = compiled.load(kernel).rope_attention(*inputs, *map(ctypes.c_int64, (2, 2, 16)), output)
print("computed", status)
"""


@pytest.mark.parametrize("kernel", RUNNABLE)
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("lengths", "heap-buffer-overflow"),
        ("lengths at an odd address", "misaligned address"),
        ("none", ""),
    ],
)
def test_a_wrong_access_ends_the_process(environment: dict[str, str], kernel: str, case: str, message: str) -> None:
    """Shows that the sanitizers watch the kernels; without this, the next test would prove nothing."""
    command = [sys.executable, "-c", CODE, kernel, case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if message:
        assert done.returncode != 0
        assert message in done.stderr
    else:
        assert (done.returncode, done.stdout, done.stderr) == (0, "computed 0\n", "")


@pytest.mark.parametrize("tests", TESTS)
def test_the_kernels_tests_pass(environment: dict[str, str], tests: str) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-k", "not triton"]
    command = [sys.executable, "-m", "pytest", *options, f"tests/unit/model/{tests}"]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, stdout=-1, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
