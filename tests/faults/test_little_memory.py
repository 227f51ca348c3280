"""Too little memory, by a real limit on the address space."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from workers import embed, start, status_of

from pipeline import SCRIPTS, Run
from seqmill.spec.lengths import LengthPolicy
from sequences import random_sequences

MAX_LENGTH = 40000

# Embeds a pack with all memory, then with only a few MB more than the process holds, and prints the outcome.
TIGHT = """
import json, re, resource, sys
from pathlib import Path
import numpy as np, torch
from seqmill.embedding.embedder import DoesNotFit, PackEmbedder
from seqmill.model.esm2 import ESM2
from seqmill.spec.models import MODELS
from seqmill.model.weights import untrained_tensors
from seqmill.model.pack import Pack
from seqmill.spec.outputs import Outputs
from seqmill.embedding.readout import Readout

number, length, megabytes = map(int, sys.argv[1:])
torch.set_num_threads(1)
architecture = MODELS["esm2_t6_8M_UR50D"]
model = ESM2(architecture, untrained_tensors(architecture), torch.float32, length + 2, "sdpa")
tokens = np.random.default_rng(1).integers(4, 24, number * (length + 2)).astype(np.uint8)
pack = Pack.from_tokens(tokens, np.full(number, length + 2, np.int64))
readout = Readout(model.architecture.family, Outputs((6,)))
unlimited = PackEmbedder(model, readout, lambda: model)(pack).rows
tried, limits = [], []
def note(module, inputs):
    tried.append(len(inputs[0]))  # the residual stream
    limits.append(embed.too_large)
model.layers[0].register_forward_pre_hook(note)
held = int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (held + (megabytes << 20),) * 2)
embed = PackEmbedder(model, readout, lambda: model)
found = {"error": "", "difference": None}
try:
    limited = embed(pack).rows
    found["difference"] = float((limited - unlimited).abs().max() / unlimited.abs().max())
except DoesNotFit as error:
    found["error"] = str(error)
limits.append(embed.too_large)
print(json.dumps({**found, "tried": tried, "limits": limits, "splits": embed.splits}))
"""


def embed_with(number: int, length: int, megabytes: int) -> dict:
    command = [sys.executable, "-c", TIGHT, *map(str, (number, length, megabytes))]
    # With a fixed threshold, malloc gives each freed tensor back; else it keeps some, and the megabytes left below
    # the limit vary by chance.
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_pack_that_does_not_fit_is_split() -> None:
    """The pieces give the same embeddings, and no size that failed is tried again."""
    found = embed_with(64, 400, 80)
    print(found)
    assert found["error"] == ""
    assert found["splits"] > 0
    assert found["difference"] < 1e-5
    tried, limits = found["tried"], found["limits"]  # the limit known at each try, and at the end
    assert tried[0] == 64 * 402
    assert all(size < limit or not limit for size, limit in zip(tried, limits[:-1], strict=True))
    failures = [size for size, before, after in zip(tried, limits, limits[1:], strict=False) if before != after]
    assert failures == [limit for limit in dict.fromkeys(limits) if limit]
    assert len(failures) == found["splits"]
    assert sum(tried) - sum(failures) == 64 * 402


def test_a_sequence_that_does_not_fit_says_so() -> None:
    """A single sequence can't be split: the error gives its length, and it is tried once."""
    found = embed_with(1, 8000, 24)
    assert found["error"] == "not enough memory for a sequence of 8002 tokens"
    assert found["tried"] == [8002]


@pytest.fixture(scope="module")
def address_space(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The peak address space, in bytes, of a worker with short sequences."""
    run = built(tmp_path_factory.mktemp("short"), [300, 300])
    worker = start(run, 0, "--threads", 1, env={**os.environ, "OMP_NUM_THREADS": "1"})
    most = 0
    try:
        while worker.poll() is None:
            status = Path("/proc", str(worker.pid), "status").read_text()
            most = max([most, *(int(line.split()[1]) << 10 for line in status.splitlines() if "VmPeak" in line)])
            time.sleep(0.01)
        _, output = worker.communicate()
    finally:
        worker.kill()
    assert worker.returncode == 0, output
    return most


def built(folder: Path, lengths: list[int]) -> Run:
    folder.mkdir(exist_ok=True)
    fasta = folder / "some.faa"
    fasta.write_text("".join(f">id{n}\n{s}\n" for n, s in enumerate(random_sequences(lengths))))
    return Run(folder, 1).build(fasta, policy=LengthPolicy("reject", MAX_LENGTH))


def limited_to(num_bytes: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


def test_a_worker_names_the_sequence_that_does_not_fit(address_space: int, tmp_path: Path) -> None:
    """One line names the sequence and the remedy; with the same limit, shorter sequences work."""
    settings: dict = {
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
        "preexec_fn": limited_to(address_space + (100 << 20)),
    }
    run = built(tmp_path / "long", [300, 30000, 300])
    failed = embed(run, 0, "--threads", 1, **settings)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    last = failed.stderr.splitlines()[-1]
    expected = "not enough memory for a sequence of 30002 tokens: 'id1' (record 2); "
    assert f"{expected}give the job more memory, or lower max_length" in last
    status = status_of(run)
    assert status["status"] == "failed"
    assert expected in status["error"]["message"]
    assert status["run"]["out_of_memory_splits"] == 1
    done = embed(built(tmp_path / "short", [300, 1000, 300]), 0, "--threads", 1, **settings)
    assert done.returncode == 0, done.stderr
