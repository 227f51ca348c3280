"""A machine with torch, Triton, NumPy, h5py, msgspec, and pytest alone can run the GPU's tests."""

import os
import subprocess
import sys

import pytest

from pipeline import REPOSITORY

BLOCKED = """
import sys
class Missing:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
names = {"Bio", "esm", "hypothesis", "pynvml", "safetensors", "tokenizers", "transformers", "zstandard"}
sys.meta_path.insert(0, Missing)
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program for which those packages are not installed."""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", f"{BLOCKED}\n{program}"]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_the_tests_of_the_gpu_are_collected_without_other_packages() -> None:
    program = "import pytest; sys.exit(pytest.main(['-q', '--collect-only', '-p', 'no:cacheprovider', 'tests/gpu']))"
    done = run(program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("model", ["esm2_t6_8M_UR50D", "dnabert_s"])
def test_untrained_weights_need_no_other_packages(model: str) -> None:
    program = f"""
sys.path.insert(0, "scripts")
from seqmill.embedding import rank
from seqmill.index import build
from seqmill.merge import merge
from seqmill.model.weights import load_weights
from seqmill.spec.models import find_model
assert find_model("untrained:{model}").architecture
"""
    done = run(program)
    assert done.returncode == 0, done.stderr
