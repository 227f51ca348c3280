"""The status JSON: its content, and the refusal of damaged ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import SCRIPTS
from seqmill.errors import SeqmillError
from seqmill.store.status import (
    COMPLETE,
    FAILED,
    AuditFacts,
    Quarantined,
    RunFacts,
    ShardStatus,
    StatusError,
    read_status,
    write_status,
)

# As written by versions before the typed status.
COMPLETE_STATUS = {
    "rank": 1,
    "world_size": 3,
    "status": COMPLETE,
    "shard_path": "/results/\\udcff/shard_1-of-3.h5",
    "attempt": 2,
    "started": "2026-11-28T08:28:30+00:00",
    "ended": "2026-11-28T08:29:30+00:00",
    "updated": "2026-11-28T08:29:30+00:00",
    "num_sequences": 3,
    "num_packs": 2,
    "done_packs": 2,
    "resumed_packs": 1,
    "error": None,
    "fingerprint": {"model": "m", "layers": "6", "shard_format": 4},
    "weights": [{"path": "m.pt", "bytes": 5, "sha256": "0", "stamp": "5 1 1 7"}],
    "run": {
        "device": "a GPU",
        "device_uuid": "GPU-1",
        "precision": "float32",
        "precision_asked": "auto",
        "threads": 1,
        "torch": "2.13.0",
        "num_tokens": 902,
        "num_residues": 900,
        "pack_fill": 0.8809,
        "num_layers": 6,
        "attention": "sdpa",
        "elementwise": "eager",
        "throughput": [[0.0, 0], [0.05, 902]],
        "done_tokens": 902,
        "tokens_per_second": 18408.2,
        "out_of_memory_splits": 0,
        "sequences_on_cpu": 0,
        "recomputed_float32": 0,
        "gpu_utilization_mean": 50.0,
        "gpu_memory_bytes_max": 7,
        "gpu_power_watts_mean": 100.5,
        "gpu_samples": 3,
        "model_flops_per_second": 36361571265,
        "model_flop_utilization": 0.5,
        "computed_by": ["a GPU, attention sdpa, eager"],
        "peak_host_bytes": 363749376,
        "peak_device_bytes": 9,
    },
    "seconds": {"import": 0.02, "verify": 0.0},
    "quarantined": {"num_sequences": 1, "first": ["'a' (record 1)"]},
    "audit": {
        "sequences": 1,
        "worst_cosine": 1.0,
        "worst_relative_error": 1e-07,
        "worst_sequence": "a",
        "reference": "fair-esm",
        "seconds": 0.5,
        "longest_included": True,
        "verdict": "ok",
    },
    "shard_sha256": "45bd",
    "shard_bytes": 7860,
    "warning": "",
}
# The status of a worker that knows nothing yet.
NOTHING = {"error": None, "fingerprint": {}, "weights": None, "run": {}, "seconds": {}, "quarantined": {}, "audit": {}}


@pytest.mark.parametrize("changes", [{}, NOTHING], ids=["complete", "begun"])
def test_a_status_is_written_as_it_was_read(tmp_path: Path, changes: dict[str, object]) -> None:
    """With the same keys, key order, and number types."""
    path, content = tmp_path / "s.json", {**COMPLETE_STATUS, **changes}
    path.write_text(json.dumps(content))
    write_status(path, read_status(path))
    written = json.loads(path.read_text())
    assert json.dumps({**written, "updated": content["updated"]}) == json.dumps(content)


def test_values_set_by_a_worker_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    status = ShardStatus(0, 1, FAILED, "s.h5", error=StatusError("OSError", "no"), run=RunFacts(num_tokens=5))
    status.run.update(threads=2)
    status.quarantined, status.audit = Quarantined(1, ["a"]), AuditFacts(sequences=0, verdict="none")
    write_status(path, status)
    assert read_status(path) == status
    assert (status.run.threads, status.run.num_layers, status.reason) == (2, None, "OSError: no")
    content = json.loads(path.read_text())
    assert (content["run"], content["audit"]) == (
        {"threads": 2, "num_tokens": 5},
        {"sequences": 0, "verdict": "none"},
    )


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("rank",), "1", "$.rank"),
        (("rank",), True, "$.rank"),
        (("status",), "done", "$.status"),
        (("attempt",), -1, "$.attempt"),
        (("error",), "text", "$.error"),
        (("error",), {"type": "OSError"}, "field `message` - at `$.error`"),
        (("run",), None, "$.run"),
        (("run", "num_tokens"), 1 << 63, "$.run.num_tokens"),
        (("run", "throughput"), [[0.0, 0], [1]], "$.run.throughput[1]"),
        (("seconds", "load"), "long", "$.seconds"),
        (("seconds", "load"), float("nan"), "malformed"),
        (("quarantined", "num_sequences"), "none", "$.quarantined.num_sequences"),
        (("audit", "verdict"), "pass", "$.audit.verdict"),
        (("other",), 1, "unknown field `other`"),
        (("warning",), "a\0b", "it contains a NUL"),
        (("fingerprint", "a\0b"), 1, "it contains a NUL"),
        (("warning",), "\ud800 in a warning", "surrogate"),
        (("fingerprint", "\udfff"), 1, "surrogate"),
    ],
)
def test_a_wrong_value_is_refused_with_its_field(
    tmp_path: Path, place: tuple[str, ...], value: object, message: str
) -> None:
    path, content = tmp_path / "s.json", json.loads(json.dumps(COMPLETE_STATUS))
    holder = content
    for name in place[:-1]:
        holder = holder[name]
    holder[place[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(SeqmillError) as error:
        read_status(path)
    assert str(error.value).startswith(f"{path}: not a seqmill status JSON: ")
    assert message in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"rank": 1}'])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(content)
    with pytest.raises(SeqmillError, match=r"s\.json: not a seqmill status JSON: "):
        read_status(path)
    with pytest.raises(SeqmillError, match=r"nowhere: no such status JSON"):
        read_status(tmp_path / "nowhere")
    with pytest.raises(SeqmillError, match=r"cannot be read"):
        read_status(tmp_path)


def test_run_facts_of_later_versions_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps({**COMPLETE_STATUS, "run": {"fans": 2, "threads": 1}}))
    assert read_status(path).run == RunFacts(threads=1)


MANY_READERS = """
import os, sys, threading
from pathlib import Path
from seqmill.store.status import read_status

sys.setswitchinterval(1e-6)
barrier = threading.Barrier(4)

def read():
    barrier.wait()
    read_status(Path(sys.argv[1]))

def read_by_threads():
    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

crashed = 0
for _ in range(50):
    if not (child := os.fork()):
        read_by_threads()
        os._exit(0)
    crashed += os.waitpid(child, 0)[1] != 0
print(crashed)
"""


def test_several_threads_may_be_the_first_to_read(tmp_path: Path) -> None:
    """As in a merge. If the threads also built msgspec's decoder, about every fifth process here would crash."""
    path = tmp_path / "s.json"
    path.write_text(json.dumps(COMPLETE_STATUS))
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run([sys.executable, "-c", MANY_READERS, path], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")
