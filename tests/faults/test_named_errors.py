"""A full or broken disk: one line that names the file by the name that the user knows."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import SCRIPTS, Run
from preload import FAILING, preloaded

ERRNOS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
FASTA = "".join(f">{number}\n{'MKVLAT' * (1 + number % 7)}\n" for number in range(50))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("embedded")
    (folder / "few.faa").write_text(FASTA)
    return Run(folder, 1).build(folder / "few.faa").embed()


def merge_command(run: Run, folder: Path) -> list[str]:
    code = (
        "import sys; from pathlib import Path; from seqmill.cli.program import exit_code_of\n"
        "from seqmill.merge.merge import merge_shards\n"
        "index, shard, status, output, records, manifest = map(Path, sys.argv[1:])\n"
        "sys.exit(exit_code_of(lambda: merge_shards(index, [shard], [status], output, records, manifest, 'float32')))"
    )
    outputs = (folder / "embeddings.h5", folder / "records.tsv.gz", folder / "manifest.json")
    return [sys.executable, "-c", code, *map(str, (run.index, run.shards[0], run.statuses[0], *outputs))]


@pytest.mark.parametrize("name", ["embeddings.h5", "records.tsv.gz", "manifest.json"])
@pytest.mark.parametrize("call", ["fsync", "write", "close"])
def test_a_merge_names_the_file(embedded: Run, tmp_path: Path, call: str, name: str) -> None:
    """Faults at each call until no call is left, alternating between a full disk and a broken one."""
    failed = 0
    for number in range(1, 200):
        kind = list(ERRNOS)[number % 2]
        (folder := tmp_path / str(number)).mkdir()
        fault = {"FAULT_CALL": call, "FAULT_FILE": f".{name}.", "FAULT_ERRNO": ERRNOS[kind], "FAULT_FROM": number}
        environment = {**preloaded(FAILING, tmp_path, **fault), "PYTHONPATH": str(SCRIPTS)}
        done = subprocess.run(merge_command(embedded, folder), env=environment, capture_output=True, text=True)
        if done.returncode == 0:
            break
        failed += 1
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert f"'{folder / name}'" in last, last
        assert f"[Errno {ERRNOS[kind]}]" in last
        left = {path.name for path in folder.iterdir()}
        assert left <= {"records.tsv.gz", "manifest.json"}  # these are renamed first
    assert failed
    assert {path.name for path in folder.iterdir()} == {"embeddings.h5", "records.tsv.gz", "manifest.json"}
