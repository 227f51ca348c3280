# What the rules share: the project (RUN), the names of its files (FOLDER), and a few functions that need Snakemake.

import os
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path

import yaml

REPOSITORY = Path(workflow.basedir)
sys.path.insert(0, str(REPOSITORY / "scripts"))

from seqmill.base.commands import USER_PATH
from seqmill.errors import SeqmillError
from seqmill.run.project import MARK, Project
from seqmill.run.settings import check_settings
from seqmill.store.layout import RunFolder, status_path_of

# Rules call `python`. It is the interpreter that runs Snakemake, even if its environment is not activated. A rule's
# conda environment still comes first. Messages propose commands for the user's own PATH.
os.environ.setdefault(USER_PATH, os.getenv("PATH", ""))
os.environ.update(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.getenv('PATH', '')}")
# The program replaces the rule's shell. Otherwise a signal that ends a cluster's job would end the shell, and Snakemake
# would then kill the worker before it has saved its packs.
shell.prefix("set -euo pipefail; exec ")


wildcard_constraints:
    dataset=r"[^/]+",
    model=r"[^/]+",
    rank=r"\d+",
    world_size=r"\d+",


@contextmanager
def errors_in_one_line():
    """End the run with `seqmill: ...` instead of a traceback."""
    try:
        yield
    except (SeqmillError, OSError) as error:
        sys.exit("\n".join(f"seqmill: {line}" for line in str(error).split("\n")))


# A cluster's login node has no GPU, but its jobs get one if the profile asks for it.
asked = workflow.resource_settings.overwrite_resources.get("embed_shard", {})

with errors_in_one_line():
    schema = yaml.safe_load((REPOSITORY / "config/schemas/config.schema.yaml").read_text())
    config.update(check_settings(config, schema, map(str, workflow.configfiles)))
    RUN = Project.open(
        config,
        REPOSITORY,
        cores=workflow.resource_settings.cores or 1,
        jobs_get_gpu="gpu" in asked and asked["gpu"] != 0,
        is_main=workflow.is_main_process,
    )

FOLDER = RunFolder(Path("results/{dataset}/{model}"))
SHARD = FOLDER.shard("{rank}", "{world_size}")


def unless_current(files, *outputs):
    """An input that triggers its job when it changes, unless the outputs are what the settings ask for.

    Snakemake would go by modification times and by the jobs that run before; `Project.are_current` compares contents.
    `files` is a path with wildcards, or a function from a dataset to paths.
    """

    def choose(wildcards):
        found = files(RUN[wildcards]) if callable(files) else str(files).format(**wildcards)
        made = [Path(str(output).format(**wildcards)) for output in outputs]
        return ancient(found) if RUN.are_current(made) else found

    return choose


def unrecorded(value):
    """A param that Snakemake uses but does not record, as it records no function of `threads`.

    So results are not computed again when the repository moves or another device is chosen.
    """
    return lambda wildcards, threads: value


def script(name):
    """The path of a program in scripts/, quoted for the shell."""
    return unrecorded(shlex.quote(str(REPOSITORY / "scripts" / name)))
