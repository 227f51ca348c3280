"""The documentation fits the program: generated parts, commands, settings, Python names, and paths of files."""

import gzip
import json
import re
import runpy
import shlex
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import yaml

import seqmill
from pipeline import REPOSITORY, SCRIPTS, Run
from seqmill.cli.main import make_parser

GENERATE = runpy.run_path(str(REPOSITORY / "docs/generate.py"))
SPEED = ("README.md", "docs/explanation/performance.md")
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(REPOSITORY.glob("docs/**/*.md"))]
# A path in backticks, from the root of the repository or from scripts/seqmill/.
NAMED_FILE = re.compile(r"`((?:[\w-]+/)+[\w-]+\.(?:py|md|smk|json|lock|def|c))`")


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Yield every block of code in a language with the name of its page."""
    for page in PAGES:
        for block in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            yield str(page.relative_to(REPOSITORY)), block


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield every command of seqmill in a block for the shell, as words."""
    for page, block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "seqmill":
                yield page, words[1:]


@pytest.mark.parametrize("name", ["commands", "models", "settings"])
def test_generated_parts_are_those_of_today(name: str) -> None:
    page = (REPOSITORY / f"docs/reference/{name}.md").read_text()
    assert GENERATE["generated"](page) == page, "run: python docs/generate.py"


@pytest.mark.parametrize(("page", "words"), list(commands()))
def test_commands_parse(page: str, words: list[str]) -> None:
    name, *arguments = words
    parsed = make_parser(name).parse_args(arguments)
    settings = {key: yaml.safe_load(value) for key, value in getattr(parsed, "config", [])}
    jsonschema.validate(settings, yaml.safe_load((REPOSITORY / "config/schemas/config.schema.yaml").read_text()))


def test_python_blocks_use_public_names() -> None:
    used = set()
    for page, block in blocks("python"):
        compile(block, page, "exec")
        used |= set(re.findall(r"\bseqmill\.(\w+)", block))
    assert {"load", "embed", "open_embeddings", "search"} <= used <= set(seqmill.__all__)


def test_named_files_exist() -> None:
    named = {(page.name, path) for page in PAGES for path in NAMED_FILE.findall(page.read_text())}
    assert len(named) > 80
    made = ("results/", "NAME", "ROOM", "resources/", "config.json")
    missing = [
        (page, path)
        for page, path in named
        if not any(word in path for word in made)
        and not any((folder / path).exists() for folder in (REPOSITORY, SCRIPTS, SCRIPTS / "seqmill"))
    ]
    assert missing == []


def test_every_page_is_in_the_site() -> None:
    nav = (REPOSITORY / "mkdocs.yml").read_text().partition("nav:")[2]
    pages = {path.relative_to(REPOSITORY / "docs").as_posix() for path in Path(REPOSITORY / "docs").rglob("*.md")}
    assert {page for page in pages if page not in nav} == set()


def test_the_page_on_python_runs(tmp_path: Path) -> None:
    """With untrained weights of another size, on a file made here; the notebook runs what needs anndata."""
    records = {f"sp|P{number}|NAME": "MKTAYIAKQRVLG"[: number - 12335] for number in range(12340, 12352)}
    fasta = tmp_path / "proteins.fasta"
    fasta.write_text("".join(f">{id_}\n{sequence}\n" for id_, sequence in records.items()))
    (tmp_path / "proteins.fasta.gz").write_bytes(gzip.compress(fasta.read_bytes()))
    folder = tmp_path / "results/proteins/esm2_t33_650M_UR50D"
    folder.mkdir(parents=True)
    Run(folder, 1).build(fasta).embed().merge()
    script = "\n".join(block for page, block in blocks("python") if page == "docs/how-to/python.md")
    for given, here in (('"esm2_t33', '"untrained:esm2_t33'), ("t33_650M", "t6_8M"), ("[-1, 20]", "[-1, 3]")):
        assert given in script
        script = script.replace(given, here)
    script = re.sub(r".*to_anndata.*\n", "", script).replace(
        "results/proteins/esm2_t6_8M_UR50D", "results/proteins/esm2_t33_650M_UR50D"
    )
    shapes = "\nassert vectors.shape == (12, 320) and embeddings.shape == (12, 320)\n"
    done = subprocess.run([sys.executable, "-c", script + shapes], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_ratios_of_speed_are_those_of_the_benchmark() -> None:
    models = json.loads((REPOSITORY / "benchmarks/results/cpu-amd-zen4.json").read_text())["models"]
    seconds = {
        name: {who: statistics.median(run["seconds"] for run in runs) for who, runs in model["runs"].items()}
        for name, model in models.items()
    }

    def span(slow: str, fast: str) -> str:
        """Return the smallest and the largest ratio, in the models of up to 150M for transformers."""
        found = [
            of[slow] / of[fast] for name, of in seconds.items() if slow.startswith("seqmill") or "650M" not in name
        ]
        return f"{min(found):.1f} to {max(found):.1f} times"

    readme, page = (" ".join((REPOSITORY / name).read_text().split()) for name in SPEED)
    faster = span("seqmill float32", "seqmill bfloat16")
    assert f"because that is {faster} as fast" in readme
    assert f"**bfloat16** is {faster} as fast" in page
    largest = seconds["esm2_t33_650M_UR50D"]
    bfloat16 = span("transformers bfloat16", "seqmill bfloat16").removesuffix(" times")
    ratio = largest["transformers bfloat16"] / largest["seqmill bfloat16"]
    assert f"takes {bfloat16} times as long as seqmill in bfloat16 from 8M to 150M and {ratio:.1f} times" in readme
    assert f"takes {span('transformers float32', 'seqmill float32')} as long from 8M to 150M, and 650M was" in readme
    assert "transformers float32" not in largest


def test_the_notebook_names_the_extras_that_it_needs() -> None:
    """`seqmill run` needs more than `seqmill[embed]`."""
    assert "pip install 'seqmill[all]'" in (REPOSITORY / "docs/tutorials/umap.ipynb").read_text()


def test_the_page_on_exports_names_the_packages_of_the_extra() -> None:
    export = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]["export"]
    page = (REPOSITORY / "docs/how-to/exports.md").read_text()
    installs = page.partition("`pip install 'seqmill[export]'` installs ")[2].partition(". ")[0]
    assert set(re.findall(r"[\w-]+", installs)) - {"and"} == {re.split("[<>=]", package)[0] for package in export}
