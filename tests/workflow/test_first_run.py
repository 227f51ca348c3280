"""The first tutorial works as it is written, without a clone, and the notebook shows why its command fails."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from pipeline import REPOSITORY, SCRIPTS

BIN = Path(sys.executable).parent
TUTORIALS = REPOSITORY / "docs/tutorials"


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(SCRIPTS), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True)


def test_every_command_and_the_python_code_work(tmp_path: Path) -> None:
    page = (TUTORIALS / "first-run.md").read_text()
    bash = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert bash[0].startswith("pip install ")
    assert len(bash) == 4
    done = run(tmp_path, "bash", "-e", "-c", "\n".join(bash[1:]))
    assert done.returncode == 0, done.stderr
    assert "complete, and every digest is right" in done.stdout
    assert "85 records, 79 sequences" in done.stdout
    (python,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    check = f"{python}\nassert embeddings.shape == (85, 320) and embeddings.ids[0] == 'gi|7525080|ref|NP_051037.1|'"
    done = run(tmp_path, sys.executable, "-c", check)
    assert done.returncode == 0, done.stderr


def test_a_failure_of_the_command_in_the_notebook_shows_its_message(tmp_path: Path) -> None:
    cells = json.loads((TUTORIALS / "umap.ipynb").read_text())["cells"]
    (cell,) = ("".join(cell["source"]) for cell in cells if "import subprocess" in "".join(cell["source"]))
    before = "import seqmill\nfrom seqmill.run.workflow_files import demo_fasta\nfasta, MODEL = demo_fasta(), 'esm9'\n"
    done = run(tmp_path, sys.executable, "-c", before + cell)
    assert done.returncode == 1
    assert "ERROR model 'esm9' is not known" in done.stderr
