"""The extras of pyproject.toml, and the messages about packages that are missing."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest

from pipeline import REPOSITORY, SCRIPTS
from seqmill.base.extras import EXTRAS, optional_packages, require_modules
from seqmill.errors import SeqmillError

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
# Used only if they happen to be installed.
NEVER_ASKED_FOR = {"triton", "umap"}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=\[]", name)[0]).lower()


def names(requirements: list[str]) -> set[str]:
    return {normalized(requirement) for requirement in requirements} - {"seqmill"}


def test_the_extras_are_those_of_pyproject() -> None:
    extras = PROJECT["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        assert names(extras[extra]) >= names(list(packages.values())), extra
    listed = {normalized(package) for packages in EXTRAS.values() for package in packages.values()}
    assert listed == set().union(*(names(extras[extra]) for extra in EXTRAS))
    (everything,) = extras["all"]
    assert everything == f"seqmill[{','.join(sorted(EXTRAS))}]"


def test_the_modules_are_those_of_the_packages() -> None:
    distributions = packages_distributions()
    for packages in EXTRAS.values():
        for module, package in packages.items():
            if module in distributions:
                assert normalized(package) in map(normalized, distributions[module])


def test_every_package_that_is_imported_is_a_dependency_or_in_an_extra() -> None:
    imported = set()
    for path in (SCRIPTS / "seqmill").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    known = set().union(*EXTRAS.values()) | names(PROJECT["dependencies"]) | NEVER_ASKED_FOR
    assert imported - set(sys.stdlib_module_names) - {"seqmill"} - known == set()
    assert imported >= {"torch", "esm", "pandas"}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("torch", "this needs torch: pip install 'seqmill[embed]'"),
        ("esm", "this needs fair-esm: pip install 'seqmill[embed]'"),
        ("snakemake", "this needs snakemake: pip install 'seqmill[workflow]'"),
        ("snakemake_executor_plugin_slurm", "this needs snakemake-executor-plugin-slurm: pip install 'seqmill[slurm]'"),
        ("faiss", "this needs faiss-cpu: pip install 'seqmill[export]'"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(module: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SeqmillError) as error, optional_packages():
        __import__(f"{module}.part")
    assert str(error.value) == line
    with pytest.raises(SeqmillError) as error:
        require_modules(module)
    assert str(error.value) == line


def test_other_modules_keep_their_error() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), optional_packages():
        __import__("no_such_module")
    require_modules("torch", "esm")


def test_all_missing_modules_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "snakemake", None)
    with pytest.raises(SeqmillError) as error:
        require_modules("snakemake", "torch", "esm")
    assert str(error.value) == "this needs snakemake and torch: pip install 'seqmill[embed,workflow]'"
