"""What the programs import: that is most of the time that a small input takes (docs/explanation/performance.md)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import MODEL, SCRIPTS, Run

LARGE = {"esm", "huggingface_hub", "pandas", "sympy", "torch", "torch._dynamo", "transformers"}
# Runs a program of the command line and prints which large packages were imported by its end.
PROGRAM = f"""
import atexit, json, sys
from seqmill.cli.main import main
found = {{}}
note = lambda when: found.setdefault(when, sorted({LARGE} & sys.modules.keys()))
atexit.register(lambda: (note("end"), print(json.dumps(found))))
"""
# Also notes them at the first pack.
WATCHED = """
from seqmill.embedding.embedder import PackEmbedder
embed = PackEmbedder.__call__
PackEmbedder.__call__ = lambda *arguments: (note("first pack"), embed(*arguments))[1]
"""


def imported(*arguments: object, watch: str = "") -> dict[str, list[str]]:
    command = [sys.executable, "-c", f"{PROGRAM}{watch}\nmain()", *map(str, arguments)]
    done = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("run"), 1)
    (run.folder / "proteins.faa").write_text(">a\nMKTAYIAKQR\n>b\nMKV\n>c\nMSHHWGYGK\n")
    return run.build(run.folder / "proteins.faa").embed().merge()


def test_a_worker_imports_fair_esm_only_for_the_audit_and_never_torch_s_compiler(run: Run, tmp_path: Path) -> None:
    shard, status = tmp_path / "shard.h5", tmp_path / "status.json"
    options = ("--index", run.index, "--rank", 0, "--world-size", 1, "--device", "cpu")
    found = imported("embed_shard", *options, "--output", shard, "--status", status, watch=WATCHED)
    assert found == {"first pack": ["torch"], "end": ["esm", "torch"]}
    audit = json.loads(status.read_text())["audit"]
    assert (audit["sequences"], audit["verdict"], audit["reference"][:8]) == (3, "ok", "fair-esm")


def test_the_programs_around_the_worker_do_not_import_torch(run: Run, tmp_path: Path) -> None:
    build = ("build_index", "--fasta", run.folder / "proteins.faa", "--model", MODEL, "--output", tmp_path / "index.h5")
    assert imported(*build) == {"end": []}
    merge = ("merge_shards", "--index", run.index, "--shards", *run.shards, "--statuses", *run.statuses)
    assert imported(*merge, "--output", tmp_path / "embeddings.h5") == {"end": []}
    report = ("report", "--embeddings", run.embeddings, "--output", tmp_path / "report.html")
    assert imported(*report) == {"end": ["pandas"]}
