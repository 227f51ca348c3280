"""File systems without locks: the pipeline works, and logs once that locks are missing."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import DEMO, SCRIPTS, SUPPORT, Run
from preload import NO_LOCKS, preloaded
from seqmill.api.embeddings import open_embeddings

ERRNOS = {"ENOLCK": errno.ENOLCK, "EOPNOTSUPP": errno.EOPNOTSUPP, "EINVAL": errno.EINVAL, "ENOSYS": errno.ENOSYS}
CODE = """
import fcntl, sys
from pathlib import Path
from pipeline import Run
from seqmill.cli import program; from seqmill.run import resources
folder = Path(sys.argv[1])
with open(sys.executable) as file:
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError:
        print("no locks", flush=True)

def work():
    run = Run(folder, 1).build(folder / "few.faa")
    assert resources._tokens_of_index(run.index, 0, 0) > 0
    run.embed().merge()

sys.exit(program.exit_code_of(work))
"""


@pytest.mark.parametrize("name", ERRNOS)
def test_the_pipeline_works_without_locks(tmp_path: Path, name: str) -> None:
    (tmp_path / "few.faa").write_text("".join(DEMO.read_text().partition("\n>")[:1]) + "\n>b\nMKVL\n")
    environment = preloaded(NO_LOCKS, tmp_path, LOCK_ERRNO=ERRNOS[name]) | {"PYTHONPATH": f"{SCRIPTS}:{SUPPORT}"}
    environment.pop("HDF5_USE_FILE_LOCKING", None)
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no locks\n"  # otherwise the test shows nothing
    assert done.stderr.count("the file system has no locks") == 1
    assert len(open_embeddings(Run(tmp_path, 1).embeddings)) == 2
