"""Without what only Linux has (as on macOS), the pipeline works and gives the same float32 embeddings."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from pipeline import DEMO, SCRIPTS, SUPPORT, Run
from seqmill.api.embeddings import open_embeddings

CODE = """
import errno, os, resource, sys
from pathlib import Path

for name in ("posix_fadvise", "posix_fallocate", "sched_getaffinity", "sched_setaffinity"):
    delattr(os, name)

def hide_proc(event, arguments):
    if event == "open" and str(arguments[0]).startswith("/proc/"):
        print("hidden", file=sys.stdout)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), arguments[0])

def setrlimit(kind, limits, set_limits=resource.setrlimit):
    if limits[0] == limits[1] or limits[0] > 10240:
        raise ValueError("current limit exceeds maximum limit")
    set_limits(kind, limits)

from seqmill.base import machine
machine.PROC = Path("/absent")
resource.setrlimit = setrlimit
sys.addaudithook(hide_proc)

from pipeline import Run
from seqmill.cli import program
folder = Path(sys.argv[1])

def work():
    Run(folder, 2).build(folder / "few.faa").embed("auto").merge()

sys.exit(program.exit_code_of(work))
"""


def test_the_pipeline_works_without_linux(tmp_path: Path) -> None:
    few = "".join(DEMO.read_text().partition("\n>")[:1]) + "\n>b\nMKVL\n"
    for name in ("linux", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "few.faa").write_text(few)
    environment = {**os.environ, "PYTHONPATH": f"{SCRIPTS}:{SUPPORT}"}
    command = [sys.executable, "-c", CODE, str(tmp_path / "other")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hidden\n")  # otherwise the test shows nothing
    assert done.stderr.count("no kernel of ours is for this processor and system in float32") == 1
    there, here = Run(tmp_path / "other", 2), Run(tmp_path / "linux", 2)
    here.build(here.folder / "few.faa").embed().merge()
    assert [shard["run"]["precision"] for shard in there.manifest["shards"]] == ["float32", "float32"]
    vectors, expected = (open_embeddings(run.embeddings)[:] for run in (there, here))
    errors = np.linalg.norm(vectors - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert errors.max() < 5e-6
