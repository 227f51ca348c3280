"""Check results, and name the next step that makes them complete and sound; change nothing."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from seqmill.base.commands import command, is_on_path
from seqmill.base.imports import importing_much
from seqmill.cli import program
from seqmill.run.doctor import Report, examine
from seqmill.run.doctor_gpus import describe_gpus
from seqmill.run.findings import Remedy
from seqmill.run.started import command_again
from seqmill.run.workflow_files import workflow_folder
from seqmill.spec.models import DEFAULT_MODEL, NAMES, released_sources

STATES = {
    Remedy.NOTHING: "complete",
    Remedy.RUN: "not complete",
    Remedy.REMOVE: "damaged",
    Remedy.REPAIR: "failed",
    Remedy.WAIT: "running",
    Remedy.ACCESS: "not readable",
}

EPILOG = """examples:
  seqmill doctor
  seqmill doctor results/proteins --check
  seqmill doctor --weights

exit codes: 0 if all results are complete and sound; 1 if not, or without results
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    program.add_results_argument(parser)
    parser.add_argument("--check", action="store_true", help="read all files and compare them with their digests")
    parser.add_argument(
        "--weights",
        action="store_true",
        help="check the released models on this disk instead: read all, and repeat the test that ended their download",
    )


def check_weights() -> int:
    """Print what is found on the released models; return the exit code."""
    with importing_much():
        from seqmill.fetch.self_test import check_weights  # imports torch, which readers of results may lack

    found = list(check_weights())
    for text, _ in found:
        print(text)
    if not found:
        folders = " or ".join(str(source.path.parent) for source in released_sources(NAMES[0]) if source.path)
        print(f"no weights of released models in {folders}\nnext: {command('fetch', DEFAULT_MODEL)}")
    return int(not found or not all(is_right for _, is_right in found))


def describe(reports: list[Report], checked: bool) -> list[str]:
    """Describe the reports in lines, the most important findings first; the last line is the next step."""
    lines = []
    for report in reports:
        digests = ", and every digest is right" if checked and report.remedy == Remedy.NOTHING else ""
        lines.append(f"{report.name}: {STATES[report.remedy]}{digests}")
        lines += [f"  {finding.text}" for finding in sorted(report.findings, key=lambda finding: -finding.remedy)]
    return [*lines, *next_step(reports)]


def next_step(reports: list[Report]) -> list[str]:
    """Return the next step as a line for the shell, after lines that say what to do before it."""
    worst = max(reports, key=lambda report: report.remedy)
    abouts = list(dict.fromkeys(finding.about for finding in worst.findings if finding.remedy == worst.remedy))
    if worst.remedy == Remedy.NOTHING:
        return ["next: nothing to do"]
    if worst.remedy == Remedy.ACCESS:
        return [f"next: make {shlex.quote(abouts[0])} readable to you, then look again"]
    if worst.remedy == Remedy.WAIT:
        of = f" of {shlex.quote(worst.name)}" if len(reports) > 1 else ""
        return [f"next: wait: a worker{of} is computing; look again later"]
    where = f"{worst.name}: " if len(reports) > 1 else ""
    first = [f"{where}{abouts[0]}"] if worst.remedy == Remedy.REPAIR else []
    is_locked = any((worst.root / ".snakemake/locks").glob("*.lock"))
    if is_locked:
        first.append("make sure that no snakemake is running there any more")
    step = command_again(worst.root, worst.name, is_locked)
    workflow = ("Snakefile", "config/config.yaml", ".snakemake")
    if not step and not any((worst.root / name).exists() for name in workflow):  # made by `seqmill index`, `shard` ...
        return [*(f"first: {line}" for line in first), "next: repeat the commands that made these files"]
    if not step:
        first.append("add the --config of the run before to the command below, if it had any")
        step = snakemake(worst.root, "--cores", "all")
        step = f"{snakemake(worst.root, '--cores', '1', '--unlock')} && {step}" if is_locked else step
    if worst.remedy == Remedy.REMOVE:
        step = f"rm {shlex.join(str(Path(about).absolute()) for about in abouts)} && {step}"
    return [*(f"first: {line}" for line in first), f"next: {step}"]


def snakemake(root: Path, *arguments: str) -> str:
    """Return the command for the current directory, from which the Snakefile and the results may be elsewhere."""
    program = ["snakemake"] if is_on_path("snakemake") else [sys.executable, "-m", "snakemake"]
    command = [*program, *arguments]
    if not Path("Snakefile").exists():
        command += ["--snakefile", str(workflow_folder() / "Snakefile")]
    return shlex.join(command if root == Path.cwd() else [*command, "--directory", str(root)])


def work(arguments: argparse.Namespace) -> int:
    if arguments.weights:
        return check_weights()
    if gpus := describe_gpus():
        print(gpus)
    reports = examine(arguments.results, arguments.check)
    if reports:
        print("\n".join(describe(reports, arguments.check)))
    else:
        reason = "no results in this folder" if os.access(arguments.results, os.F_OK) else "no such folder"
        print(f"{arguments.results}: {reason}; name another folder, or make results\nnext: {command('run', '--help')}")
    return int(not reports or any(report.remedy != Remedy.NOTHING for report in reports))
