"""Run the README's commands and Python code unchanged, in a folder without a clone.

.ci/run covers `make run` and `make test`.
"""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import DEMO, IMPATIENT, REPOSITORY
from reference import fair_esm_hidden, fair_esm_model, save_checkpoint
from seqmill.base.files import sha256_of_file
from seqmill.spec.models import MODELS

BIN = Path(sys.executable).parent
README = (REPOSITORY / "README.md").read_text()
COVERED_BY_CI = {"make run", "make test"}
INSTALL = "pip install 'seqmill[all]'"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line and line not in {INSTALL, *COVERED_BY_CI}]


NAME = "esm2_t6_8M_UR50D"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded weights under the name of a released model."""
    return save_checkpoint(fair_esm_model(MODELS[NAME]), tmp_path_factory.mktemp("mirror") / f"{NAME}.pt")


@pytest.fixture(scope="module")
def mirror(weights: Path) -> Iterator[str]:
    """The address of a server with these weights."""
    folder = weights.parent
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_ci_runs_the_two_commands() -> None:
    assert set((REPOSITORY / ".ci/run").read_text().splitlines()) >= COVERED_BY_CI
    assert {line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()} > COVERED_BY_CI


def test_the_extras_exist() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    install = README.partition("## Install\n")[2].partition("\n## ")[0]
    named = re.findall(r"(?:seqmill|\.|`)\[(\w+)\]", install)
    assert INSTALL in install
    assert set(named) == extras.keys() - {"test"}


def write_facts(facts: Path, weights: Path) -> None:
    """Register the seeded weights as the released ones, because the tests have no trained weights."""
    hidden = fair_esm_hidden(fair_esm_model(MODELS[NAME]), "MKV")[:2, :8].round(4).tolist()
    test = {"from": "fair-esm", "tolerance": 1e-4, "cases": [{"sequence": "MKV", "hidden": hidden}]}
    files = {weights.name: {"size": weights.stat().st_size, "sha256": sha256_of_file(weights)}}
    sources = [{"url": "https://original.example", "files": files}]
    facts.write_text(json.dumps({NAME: {"sources": sources, "self_test": test}}))


def test_every_command_and_the_python_code_work(mirror: str, weights: Path, tmp_path: Path) -> None:
    clone, folder, models = tmp_path / "clone", tmp_path / "folder", tmp_path / "models"
    for name in ("Snakefile", "config", "report", "rules", "scripts", "envs", "profiles"):
        source = REPOSITORY / name
        clone.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, clone / name)
    write_facts(clone / "scripts/seqmill/spec/released.json", weights)
    folder.mkdir()
    shutil.copy(DEMO, folder / "proteins.faa")
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(clone / "scripts"),
        "SEQMILL_MODELS": str(models),
        "SEQMILL_WEIGHTS_URL": mirror,
        "no_proxy": "*",
    }
    assert len(commands()) == 2
    script = "set -e\n" + "\n".join(commands())
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (models / f"{NAME}.pt").read_bytes() == weights.read_bytes()
    assert "computes the published numbers" in (models / f"{NAME}.json").read_text()
    assert "next: nothing to do" in done.stdout
    assert "UNTRAINED" not in done.stdout + done.stderr

    (python,) = blocks("python")
    check = python + "\nassert vectors.shape == (2, 320)\nassert embeddings.shape == (85, 320)\n"
    command = [sys.executable, "-c", check]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_a_network_the_message_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "p.faa").write_text(">a\nMKV\n")
    command = [str(BIN / "snakemake"), "--snakefile", str(REPOSITORY / "Snakefile"), "--directory", str(tmp_path)]
    command += ["--cores", "1", "--config", "fasta=p.faa", "model=esm2_t6_8M_UR50D"]
    # Port 9 (discard) is closed on any machine that could run this.
    environment = {**os.environ, "SEQMILL_WEIGHTS_URL": "http://127.0.0.1:9", "no_proxy": "*", "PYTHONPATH": IMPATIENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "cannot fetch http://127.0.0.1:9/esm2_t6_8M_UR50D.pt" in output
    file = tmp_path / "resources/models/esm2_t6_8M_UR50D.pt"
    assert f"{NAME} --output {file}` where there is internet" in output
    assert "Traceback" not in output
