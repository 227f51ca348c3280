"""The seqmill command: its subcommands are the programs of scripts/, and their usage says so."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import SCRIPTS
from seqmill.cli.main import PROGRAMS


def seqmill(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    command = f"{before}\nfrom seqmill.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", command, *arguments], cwd=SCRIPTS, capture_output=True, text=True, check=False
    )


def test_the_subcommands_are_the_programs_of_scripts() -> None:
    launchers = {path.stem for path in SCRIPTS.glob("*.py") if f'launch("{path.stem}")' in path.read_text()}
    assert PROGRAMS.keys() == launchers


def test_help_lists_the_subcommands_in_the_order_of_the_pipeline() -> None:
    done = seqmill("--help")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ")]
    assert dict(lines) == PROGRAMS
    order = ["fetch_weights", "build_index", "embed_shard", "merge_shards", "report", "export"]
    assert [name for name, _ in lines if name in order] == order


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_usage_of_a_subcommand_says_seqmill(name: str) -> None:
    done = seqmill(name, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: seqmill {name} [-h]")


@pytest.mark.parametrize("arguments", [(), ("embed",)])
def test_other_names_are_refused_with_the_allowed_ones(arguments: tuple[str, ...]) -> None:
    done = seqmill(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert all(f"  {name} " in done.stderr for name in PROGRAMS)


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
