"""On a machine with many GPUs, all GPUs work at once, each on one shard at a time.

The devices are fake (CUDA_VISIBLE_DEVICES), and the workers compute on the CPU: the tests check which worker leases
which device.
"""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from fake_gpus import COMPUTE_ON_CPU
from pipeline import MODEL, REPOSITORY, SCRIPTS
from sequences import random_sequences

DEVICES = [str(number) for number in range(8)]
LINE = re.compile(r"^(\d\d:\d\d:\d\d) INFO GPU (\d) (of|is free again)", re.MULTILINE)


def leases(logs: list[Path]) -> dict[str, list[tuple[str, str]]]:
    """Return the times, as HH:MM:SS, at which each device was leased and freed, in order."""
    found: dict[str, list[tuple[str, str]]] = {}
    for log in logs:
        (began, device, of), (ended, same, freed) = LINE.findall(log.read_text())
        assert (of, freed, same) == ("of", "is free again", device)
        found.setdefault(device, []).append((began, ended))
    return {device: sorted(times) for device, times in found.items()}


@pytest.mark.parametrize("shards", [8, 20])
def test_eight_devices_each_with_one_worker_at_a_time(shards: int, tmp_path: Path) -> None:
    fasta = tmp_path / "p.faa"
    fasta.write_text("".join(f">id{n}\n{s}\n" for n, s in enumerate(random_sequences([12] * 40))))
    command = [str(Path(sys.executable).with_name("snakemake")), "--snakefile", str(REPOSITORY / "Snakefile")]
    command += ["--directory", str(tmp_path), "--cores", "8", "--resources", "gpu=8", "--config", f"fasta={fasta}"]
    command += [f"model={MODEL}", f"shards={shards}", "audit_seconds=0"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(DEVICES), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{COMPUTE_ON_CPU}:{SCRIPTS}"
    # Leases are files in TMPDIR; the default one is shared with other tests on this machine.
    environment["TMPDIR"] = str(tmp_path)
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logs = sorted((tmp_path / "logs").rglob("embed_shard_*.log"))
    assert len(logs) == shards
    by_device = leases(logs)
    assert sum(map(len, by_device.values())) == shards
    # Eight workers start at once, and each leases a device before it imports torch, which takes seconds.
    assert sorted(by_device) == DEVICES
    for times in by_device.values():
        for (_, ended), (began, _) in pairwise(times):
            assert ended <= began
    for status in (tmp_path / "results").rglob("*.status.json"):
        assert json.loads(status.read_text())["run"]["threads"] == 1  # one core per GPU
