"""The references of the audit that are written out take no more memory than estimated; it is linear in length."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline import SCRIPTS
from seqmill.embedding.audit import MOST_BYTES
from seqmill.embedding.references.families import memory
from seqmill.spec.models import MODELS

MEMORY = """
import sys
import torch
from dataclasses import replace
from seqmill.embedding.references.families import make_reference, memory
from seqmill.spec.models import MODELS
from seqmill.model.weights import untrained_tensors

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

architecture, num_tokens = replace(MODELS[sys.argv[1]], num_layers=1), int(sys.argv[2])
parts = {name: [tensor] for name, tensor in untrained_tensors(architecture).items()}
with torch.inference_mode():
    reference = make_reference(architecture, parts, num_tokens)
    reference.embed(torch.arange(10), (1,))
    before = kilobytes("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
    reference.embed(torch.arange(num_tokens) % architecture.vocabulary, (1,))
print(1024 * (kilobytes("VmHWM") - before), memory(architecture, num_tokens))
"""


# Of each family that is written out, the widest model.
NAMES = ["dnabert_s", "esmc_6b", "prott5_xl_u50"]


@pytest.mark.parametrize("name", NAMES)
def test_the_default_limit_of_a_family_is_audited(name: str) -> None:
    """Scores do not count in full: twice the length takes twice the memory."""
    architecture = MODELS[name]
    assert memory(architecture, architecture.family.max_length) < MOST_BYTES
    growth = np.diff([memory(architecture, num_tokens) for num_tokens in (10_000, 20_000, 30_000)])
    assert growth[0] == growth[1]


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_long_sequences_take_no_more_memory_than_estimated(name: str) -> None:
    num_tokens = 4000
    program = [sys.executable, "-c", MEMORY, name, str(num_tokens)]
    done = subprocess.run(program, env={**os.environ, "PYTHONPATH": str(SCRIPTS)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used, reckoned = map(int, done.stdout.split())
    print(f"{used / 1e6:.0f} MB used, {reckoned / 1e6:.0f} MB reckoned with")
    assert used < reckoned < 4 * MODELS[name].num_heads * num_tokens**2  # one copy of all scores
