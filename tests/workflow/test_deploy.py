"""The workflow out of a git repository: `snakemake --snakefile gh:...`, and what snakedeploy writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import MODEL, REPOSITORY
from seqmill import open_embeddings

TAG = "v0.0-test"
SLUG = "untrained-esm2_t6_8M_UR50D"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which a repository on this disk, with the files of this tree, stands for one on GitHub."""
    folder = tmp_path_factory.mktemp("hosts")
    repository = folder / "virome/seqmill"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:
        if (REPOSITORY / name).is_file():
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            (repository / name).write_bytes((REPOSITORY / name).read_bytes())
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "all"], ["tag", TAG]):
        subprocess.run(["git", *arguments], cwd=repository, check=True)
    settings = folder / "gitconfig"
    settings.write_text(f'[url "file://{folder}/"]\n    insteadOf = https://github.com/\n')
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    own = {"GIT_CONFIG_GLOBAL": str(settings), "XDG_CACHE_HOME": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    return {**without, **own}


def run(folder: Path, environment: dict[str, str], *command: str) -> str:
    """Run a command in a folder and return what it printed."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_snakefile_by_its_address(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "p.faa").write_text(">a\nMKV\n")
    snakemake = str(Path(sys.executable).with_name("snakemake"))
    command = [snakemake, "--snakefile", f"gh:virome/seqmill@{TAG}", "--cores", "2", "--config", "fasta=p.faa"]
    run(tmp_path, environment, *command, f"model={MODEL}")
    assert open_embeddings(tmp_path / f"results/p/{SLUG}/embeddings.h5").ids == ["a"]
    # The programs are those of the tag, not those of the environment.
    (unpacked,) = Path(environment["XDG_CACHE_HOME"]).glob("**/source-cache/seqmill/*/scripts/embed_shard.py")
    assert str(unpacked) in run(tmp_path, environment, *command, f"model={MODEL}", "-n", "--forceall", "-p")


def test_snakedeploy(tmp_path: Path, environment: dict[str, str]) -> None:
    tool = tmp_path / "venv"
    run(tmp_path, environment, sys.executable, "-m", "venv", str(tool))
    run(tmp_path, environment, str(tool / "bin/pip"), "install", "--quiet", "snakedeploy==0.17.1")
    deploy = [str(tool / "bin/snakedeploy"), "deploy-workflow", "https://github.com/virome/seqmill", "work"]
    run(tmp_path, environment, *deploy, "--tag", TAG)
    snakemake = str(Path(sys.executable).with_name("snakemake"))
    output = run(tmp_path / "work", environment, snakemake, "--cores", "2", "--dry-run")
    assert "results/demo/untrained-esm2_t6_8M_UR50D/embeddings.h5" in output
    # The settings and the table are now the user's.
    (tmp_path / "work/config/datasets.tsv").write_text(f"dataset\tfasta\tmodel\nmine\tp.faa\t{MODEL}\n")
    (tmp_path / "work/p.faa").write_text(">a\nMKV\n")
    run(tmp_path / "work", environment, snakemake, "--cores", "2")
    assert open_embeddings(tmp_path / f"work/results/mine/{SLUG}/embeddings.h5").ids == ["a"]
