"""A GPU image that has torch, NumPy, h5py, msgspec, and the packages of the extra embed, but nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import SCRIPTS

BLOCKED = (
    *(
        "triton",
        "flash_attn",
        "flash_attn_interface",
        "transformers",
        "einops",
        "accelerate",
        "Bio",
        "scipy",
        "sklearn",
    ),
    *("pandas", "matplotlib", "umap", "anndata", "faiss", "pyarrow", "IPython", "snakemake", "jsonschema"),
    *("rich", "jinja2", "shtab", "psutil"),
)
# In the extra, but a worker does without: utilization is not sampled, and the audit runs our own forward.
OPTIONAL = ("pynvml", "esm")
# Modules that are no part of a worker, and the package that each needs.
NEED = {
    "seqmill.api.embeddings": "pandas",
    "seqmill.neighbors": "pandas",
    "seqmill.report.page": "jinja2",
    "seqmill.run.settings": "jsonschema",
    "seqmill.run.watch": "rich",
}
IMPORT_ALL = """
import importlib, json, pkgutil, seqmill
failed = {}
for module in pkgutil.walk_packages(seqmill.__path__, "seqmill."):
    if module.name == "seqmill.__main__":  # it runs the command
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        failed[module.name] = error.name.partition(".")[0]
print(json.dumps(failed))
"""
EMBED = """
import sys
from pathlib import Path
from seqmill.embedding.worker import embed_shard
from seqmill.index.build import build_index
from seqmill.merge.merge import merge_shards
from seqmill.spec.lengths import choose_length_policy
from seqmill.spec.models import find_model
from seqmill.spec.task import ComputeSettings, ShardTask
fasta, folder, model = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
index, shard, status = (folder / name for name in ("index.h5", "shard_0-of-1.h5", "shard_0-of-1.status.json"))
policy = choose_length_policy(find_model(model).family, "auto", "auto", "auto", "auto", "forward")
build_index(fasta, index, model, policy)
embed_shard(ShardTask(index, 0, 1, shard, status, ComputeSettings(device="cpu", precision="float32", threads=1)))
"""


def run_blocked(program: str, *arguments: object) -> str:
    """Run a program for which those packages can't be imported; return what it prints."""
    block = f"import sys\nfor name in {BLOCKED + OPTIONAL}: sys.modules[name] = None\n"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", block + program, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_modules_import_but_those_that_need_a_package() -> None:
    assert json.loads(run_blocked(IMPORT_ALL)) == NEED


@pytest.mark.parametrize("model", ["untrained:esm2_t6_8M_UR50D", "untrained:dnabert_s"])
def test_a_worker_needs_none_of_them(tmp_path: Path, model: str) -> None:
    fasta = tmp_path / "tiny.fa"
    fasta.write_text(">a\nACGTACGTTTGACA\n>b\nGATTACAGATTACA\n")
    run_blocked(EMBED, fasta, tmp_path, model)
    status = json.loads((tmp_path / "shard_0-of-1.status.json").read_text())
    assert (status["status"], status["num_sequences"]) == ("complete", 2)
    assert status["audit"]["sequences"] >= 1  # more if its time allows
    assert status["audit"]["verdict"] == "ok"
