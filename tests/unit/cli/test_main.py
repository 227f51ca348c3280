"""The seqmill command: its subcommands are the programs of scripts/, and their usage says so."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import SCRIPTS
from seqmill.base.commands import LAUNCHERS
from seqmill.cli.main import COMMANDS, GROUPS, make_parser
from seqmill.version import __version__ as seqmill_version


def seqmill(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    command = f"{before}\nfrom seqmill.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", command, *arguments], cwd=SCRIPTS, capture_output=True, text=True, check=False
    )


def test_each_launcher_runs_a_subcommand() -> None:
    launched = [re.search(r'launch\("(\w+)"\)', path.read_text())[1] for path in SCRIPTS.glob("*.py")]
    assert len(set(launched)) == len(launched)
    assert set(launched) <= COMMANDS.keys()
    for name, launcher in LAUNCHERS.items():
        assert f'launch("{name}")' in (SCRIPTS / f"{launcher}.py").read_text()


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_the_subcommands_in_groups_and_the_exit_codes(option: str) -> None:
    done = seqmill(option)
    assert (done.returncode, done.stderr) == (0, "")
    blocks = {block.partition(":\n")[0]: block.splitlines()[1:] for block in done.stdout.split("\n\n")}
    for title, group in GROUPS.items():
        assert [tuple(line.split(maxsplit=1)) for line in blocks[title]] == list(group.items())
    assert [line.split()[0] for line in blocks["exit codes"]] == ["0", "1", "2", "130", "128+N", "run"]
    for line in blocks["examples"]:
        assert line.split()[0] == "seqmill"
        assert line.split()[1] in COMMANDS


def test_the_version() -> None:
    done = seqmill("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"seqmill {seqmill_version}\n", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_usage_of_a_subcommand_says_seqmill(name: str) -> None:
    done = seqmill(name, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: seqmill {name} [-h]")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_subcommand_are_right_usage(name: str) -> None:
    """Each line below `examples:` that calls seqmill parses; what it names need not exist."""
    epilog = make_parser(name).epilog or ""
    examples = re.findall(r"^  (?:.*\| )?seqmill (.*?)(?:  .*| [>|] .*)?$", epilog, re.MULTILINE)
    assert examples
    for example in examples:
        subcommand, *arguments = shlex.split(example)
        make_parser(subcommand).parse_args(arguments)


def test_without_a_name_all_are_listed() -> None:
    done = seqmill()
    assert (done.returncode, done.stdout) == (2, "")
    assert all(f"  {name} " in done.stderr for name in COMMANDS)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("build_index", "index"),
        ("embed_shard", "shard"),
        ("fetch_weights", "fetch"),
        ("model", "models"),
        ("docter", "doctor"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(typo: str, meant: str) -> None:
    done = seqmill(typo)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"seqmill: no subcommand {typo!r}; did you mean {meant}? `seqmill --help` lists them\n"


@pytest.mark.parametrize("other", ["qqq", "--qqq"])
def test_an_unknown_name_without_a_near_one(other: str) -> None:
    done = seqmill(other)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert other in line
    assert "did you mean" not in line


def test_watch_without_rich_names_the_extra() -> None:
    done = seqmill("watch", "--once", before="import sys; sys.modules['rich'] = None")
    assert done.returncode == 1
    assert done.stderr.endswith("this needs rich: pip install 'seqmill[workflow]'\n")
    assert "Traceback" not in done.stderr


def test_with_standard_output_closed_a_program_reports_its_own_error(tmp_path: Path) -> None:
    build = [sys.executable, SCRIPTS / "build_index.py", "--fasta", "none.fa", "--model", "untrained:dnabert_s"]
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *build, "--output", tmp_path / "index.h5"]
    done = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "none.fa" in done.stderr
    assert "Traceback" not in done.stderr
