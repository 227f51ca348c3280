"""pyproject, lock, and conda environments agree on versions, and the locked versions are installed."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import seqmill.version
from pipeline import REPOSITORY, SCRIPTS

CONDA_NAMES = {"pytorch": "torch"}


def locked() -> dict[str, str]:
    """Return the locked versions and that of torch, which the Makefile installs separately."""
    lock = re.findall(r"^([\w.-]+)==(\S+)", (REPOSITORY / "requirements.lock").read_text(), re.MULTILINE)
    torch = re.findall(r"^TORCH := (torch)==(\S+)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert len(torch) == 1
    return {normalized(name): version for name, version in [*lock, *torch]}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("lock", ["requirements.lock", "docs/requirements.lock"])
def test_every_locked_package_has_hashes(lock: str) -> None:
    """torch has no hash and is not in the lock, because pip refuses a lock if any line lacks hashes."""
    text = (REPOSITORY / lock).read_text()
    body = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    entries = re.findall(r"[\w.-]+==\S+(?: ; .+)?(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n", body)
    assert "".join(entries) == body
    assert len(entries) > 90
    assert not re.search(r"^torch==", text, re.MULTILINE)


def test_every_installer_uses_the_hashes_of_the_lock_and_the_same_torch() -> None:
    for name in ("Makefile", "envs/Dockerfile", "envs/seqmill.def"):
        text = (REPOSITORY / name).read_text()
        assert re.search(r"--require-hashes (-r|--requirement) \S*requirements\.lock", text), name
        assert set(re.findall(r"torch==([\d.]+)", text)) == {locked()["torch"]}, name


def test_macos_gets_no_triton_which_has_wheels_for_linux_alone() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [requirement for extra in extras.values() for requirement in extra if requirement.startswith("triton")]
    asked += re.findall(r"^triton==.+", (REPOSITORY / "requirements.lock").read_text(), re.MULTILINE)
    assert len(asked) == 2
    assert all(re.search("; sys_platform == ['\"]linux['\"]", requirement) for requirement in asked)
    assert not re.search(
        r"^(triton|nvidia-(?!ml-py)[\w-]+)==", (REPOSITORY / "docs/requirements.lock").read_text(), re.M
    )


def test_conda_environments_have_the_locked_versions() -> None:
    lock = locked()
    for path in (REPOSITORY / "envs").glob("*.yaml"):
        for dependency in yaml.safe_load(path.read_text())["dependencies"]:
            name, wanted = dependency.split("=")
            if name != "python":
                assert lock[normalized(CONDA_NAMES.get(name, name))] == wanted, f"{path.name}: {dependency}"


def dependencies(*extras: str) -> set[str]:
    """Return the names of pyproject's dependencies, without and with these extras."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return {re.split(r"[<>=\[;]", requirement)[0] for requirements in lists for requirement in requirements} - {
        "seqmill"
    }


def test_the_lock_pins_every_dependency_of_pyproject() -> None:
    needed = map(normalized, dependencies("embed", "workflow", "slurm", "export", "test"))
    # No version of AnnData supports both the locked pandas and Python 3.11.
    assert set(needed) - locked().keys() == {"anndata"}


def test_the_conda_environments_have_what_their_rules_need() -> None:
    needed = {"seqmill": dependencies("embed"), "export": dependencies("embed", "export") - {"anndata"}}
    for path in (REPOSITORY / "envs").glob("*.yaml"):
        names = {dependency.split("=")[0] for dependency in yaml.safe_load(path.read_text())["dependencies"]}
        assert {CONDA_NAMES.get(name, name) for name in names} - {"python"} == needed[path.stem], path.name


def test_the_container_recipes_copy_existing_files() -> None:
    recipe = (REPOSITORY / "envs/seqmill.def").read_text()
    pairs = [line.split() for line in recipe.partition("%files\n")[2].partition("\n\n")[0].splitlines()]
    assert all(len(pair) == 2 for pair in pairs)  # Apptainer drops the rest of a line
    copies = re.findall(r"^COPY (.+)$", (REPOSITORY / "envs/Dockerfile").read_text(), re.MULTILINE)
    in_docker = {source for line in copies for source in line.split()[:-1]}
    assert {source for source, _ in pairs} == in_docker
    assert [source for source in in_docker if not (REPOSITORY / source).exists()] == []


def test_the_locked_versions_are_installed() -> None:
    wrong = {name: version(name) for name, wanted in locked().items() if version(name).split("+")[0] != wanted}
    assert not wrong


@pytest.mark.parametrize("program", sorted(path.name for path in SCRIPTS.glob("*.py")))
def test_every_program_explains_every_option(program: str) -> None:
    help_text = subprocess.run(
        [sys.executable, str(SCRIPTS / program), "--help"], capture_output=True, text=True, check=True
    ).stdout
    options = re.split(r"^  (?=-)", help_text, flags=re.MULTILINE)[1:]
    assert options
    for option in options:
        explanation = option.partition("  ")[2] or option.partition("\n")[2]
        assert len(re.findall(r"[a-z]{2,}", explanation)) >= 3, option


def test_every_relative_link_in_the_documentation_resolves() -> None:
    pages = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("config/*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text())]
    assert len(links) > 3
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def test_the_contract_about_torch_names_all_of_run_but_what_computes() -> None:
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (contract for contract in contracts if "torch" in contract.get("forbidden_modules", ()))
    modules = {f"seqmill.run.{path.stem}" for path in (SCRIPTS / "seqmill/run").glob("[a-z]*.py")}
    named = {name for name in contract["source_modules"] if name.startswith("seqmill.run.")}
    assert modules - named == {"seqmill.run.calibration", "seqmill.run.plan"}


def test_the_citation_and_the_catalog_know_the_version_the_authors_and_the_files() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (seqmill.version.__version__, project["license"])
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]
    assert f"Copyright (c) 2026 {citation['authors'][0]['name']}" in (REPOSITORY / "LICENSE").read_text()
    usage = yaml.safe_load((REPOSITORY / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert True in usage["software-stack-deployment"].values()  # or else the catalog shows no deployment
    assert usage["report"] == ("report(" in (REPOSITORY / "rules/report.smk").read_text())


def test_the_tests_write_no_weights_into_the_repository() -> None:
    assert not Path(os.environ["SEQMILL_MODELS"]).is_relative_to(REPOSITORY)


def test_the_package_does_not_import_snakemake() -> None:
    sources = "".join(path.read_text() for path in Path(SCRIPTS / "seqmill").rglob("*.py"))
    assert not re.search(r"^\s*(from|import) snakemake", sources, re.MULTILINE)
