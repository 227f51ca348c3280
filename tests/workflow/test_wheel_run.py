"""An installed wheel runs the workflow in any folder: no clone, and no package but the wheel's own."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest

from distributions import build_sdist, build_wheel, copy_sources
from pipeline import CONTIGS_DEMO, DEMO, MODEL, REPOSITORY, SCRIPTS, Run
from seqmill import open_embeddings

pytestmark = pytest.mark.full  # it takes minutes
SLUG = "untrained-esm2_t6_8M_UR50D"
RESULTS = Path("results/proteins", SLUG)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that was built from a source distribution."""
    sources = copy_sources(tmp_path_factory.mktemp("sources"))
    # Without a compiler: kernels take a minute to compile, and tests/unit/model/test_wheel.py has those of a wheel.
    return build_wheel(build_sdist(sources), sources / "wheels", PATH=str(sources), CC="cc")[0]


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; other packages are those of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    # A path in a .pth file does not run the .pth files there, so the editable seqmill is not found.
    (site_packages(folder) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [folder / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True
    )
    return folder


def site_packages(environment: Path) -> Path:
    (folder,) = environment.glob("lib/python3*/site-packages")
    return folder


def run(environment: Path, folder: Path, *command: object) -> str:
    """Run a command of the environment in `folder`, where no clone is found; return both output streams."""
    program, *arguments = map(str, command)
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(environment / "bin" / program), *arguments],
        cwd=folder,
        env={**variables, "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def made(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which the demo's proteins were embedded, and Snakemake's output."""
    folder = tmp_path_factory.mktemp("folder")
    shutil.copy(DEMO, folder / "proteins.faa")
    return folder, run(environment, folder, "seqmill", "run", "proteins.faa", "--model", MODEL, "--gpus", 2)


def test_the_wheel_s_own_package_runs(environment: Path, tmp_path: Path) -> None:
    code = "import seqmill; from seqmill.run.workflow_files import workflow_folder as f; print(seqmill.__file__, f())"
    package = site_packages(environment) / "seqmill"
    assert run(environment, tmp_path, "python", "-c", code).split() == [
        str(package / "__init__.py"),
        str(package / "workflow"),
    ]


def test_the_wheel_has_all_files_of_the_workflow(wheel: Path) -> None:
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    folders = ("config", "envs", "profiles", "report", "rules", "tests/data")
    expected = [path for folder in folders for path in (REPOSITORY / folder).rglob("*") if path.is_file()]
    expected += [REPOSITORY / "Snakefile", *SCRIPTS.glob("*.py")]
    inside = {name.relative_to("seqmill/workflow") for name in names if name.is_relative_to("seqmill/workflow")}
    assert {path.relative_to(REPOSITORY) for path in expected} == inside - {Path("scripts/seqmill.py")}
    assert Path("seqmill/py.typed") in names


def test_it_embeds_with_the_same_bits_as_a_clone(made: tuple[Path, str], tmp_path: Path) -> None:
    folder, output = made
    assert {path.name for path in folder.iterdir()} == {".snakemake", "logs", "proteins.faa", "results"}
    found = open_embeddings(folder / RESULTS / "embeddings.h5")
    alone = Run(tmp_path, 1).build(DEMO).embed("auto").merge()
    assert np.array_equal(found[:], open_embeddings(alone.embeddings)[:])
    assert sorted(path.name for path in (folder / RESULTS / "shards").glob("*.h5")) == [
        "shard_0-of-2.h5",
        "shard_1-of-2.h5",
    ]
    assert f"import seqmill; e = seqmill.open_embeddings('{RESULTS}/embeddings.h5')" in output
    trained = re.search("For real ones give a trained model, e.g. (.*)", output)[1]
    assert trained.endswith("/bin/python -m seqmill run proteins.faa --model esm2_t33_650M_UR50D")


def test_a_second_run_does_nothing(environment: Path, made: tuple[Path, str]) -> None:
    assert "Nothing to be done" in run(environment, made[0], "seqmill", "run", "proteins.faa", "--model", MODEL)


def test_the_same_results_in_a_clone_are_not_computed_again(made: tuple[Path, str]) -> None:
    command = [sys.executable, "-m", "seqmill", "run", "proteins.faa", "--model", MODEL]
    done = subprocess.run(
        command, cwd=made[0], env={**os.environ, "PYTHONPATH": str(SCRIPTS)}, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert str(REPOSITORY / "Snakefile") in done.stderr
    assert "Nothing to be done" in done.stdout + done.stderr


def test_a_run_with_an_output_folder(environment: Path, made: tuple[Path, str]) -> None:
    """Its messages name files that can be found from where it was started."""
    folder = made[0]
    output = run(environment, folder, "seqmill", "run", "proteins.faa", "--model", MODEL, "--output", "new/my results")
    (path,) = re.findall(r"open_embeddings\('(.+)'\)", output)
    assert path == f"{folder}/new/my results/{RESULTS}/embeddings.h5"
    assert np.array_equal(open_embeddings(path)[:], open_embeddings(folder / RESULTS / "embeddings.h5")[:])


def test_a_dry_run_on_slurm(environment: Path, made: tuple[Path, str], tmp_path: Path) -> None:
    options = ("--model", MODEL, "--profile", "slurm", "--gpus", 3)
    output = run(environment, tmp_path, "seqmill", "run", made[0] / "proteins.faa", *options, "--", "--dry-run")
    assert re.search(r"^embed_shard +3$", output, re.MULTILINE)
    assert str(site_packages(environment) / "seqmill/workflow/profiles/slurm") in output


def test_the_table_of_the_workflow_works(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text("shards: 1\n")
    output = run(environment, tmp_path, "seqmill", "run", "--", "--dry-run")
    assert f"{site_packages(environment)}/seqmill/workflow/tests/data/{CONTIGS_DEMO.name}" in output
    assert re.search(r"^build_index +2$", output, re.MULTILINE)


def test_a_launcher_finds_its_package_with_a_python_that_has_no_seqmill(environment: Path, tmp_path: Path) -> None:
    """As under --software-deployment-method conda."""
    other = tmp_path / "other"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", other], check=True)
    with pytest.raises(AssertionError, match="No module named 'seqmill'"):
        run(other, tmp_path, "python", "-c", "import seqmill")
    (site_packages(other) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    launchers = site_packages(environment) / "seqmill/workflow/scripts"
    run(other, tmp_path, "python", launchers / "build_index.py", "--fasta", DEMO, "--model", MODEL, "--output", "i.h5")
    shard = ("--rank", 0, "--world-size", 1, "--output", "shard.h5", "--status", "status.json")
    output = run(other, tmp_path, "python", launchers / "embed_shard.py", "--index", "i.h5", *shard)
    assert "complete: 79 sequences" in output
    code = f"""
import sys
sys.path.insert(0, {str(launchers)!r})
import seqmill, seqmill.report.page
print(seqmill.__file__, seqmill.open_embeddings, [path for path in sys.path if {str(environment)!r} in path])
"""
    found = run(other, tmp_path, "python", "-c", code)
    assert found.startswith(str(site_packages(environment) / "seqmill/__init__.py"))
    assert found.endswith(f"[{str(launchers)!r}]\n")
