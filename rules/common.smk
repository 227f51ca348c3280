# What the rules share: the project (RUN), the names of its files (FOLDER), and a few functions that need Snakemake.

import shlex
from contextlib import contextmanager

import yaml
from snakemake.path_modifier import PathModifier

try:
    from seqmill.base.commands import USER_PATH
    from seqmill.errors import SeqmillError
    from seqmill.run.project import MARK, Project
    from seqmill.run.settings import check_settings
    from seqmill.run.watch import print_progress
    from seqmill.store.layout import RunFolder, status_path_of
except ModuleNotFoundError as error:
    sys.exit(
        f"seqmill: Snakemake's environment has no {error.name}; install what reads the settings: "
        "pip install numpy h5py jsonschema msgspec rich"
    )

IS_MODULE = not workflow.modifier.is_main_snakefile()
# Programs run with the interpreter that runs Snakemake, even if its environment is not activated, but a rule's conda
# environment or container comes first. Python replaces the rule's shell. Otherwise a signal that ends a cluster's job
# would end the shell, and Snakemake would then kill the worker before it has saved its packs.
if IS_MODULE:  # PATH and prefix are those of all rules of the other workflow
    PYTHON = f"exec {'python' if workflow.deployment_settings.deployment_method else shlex.quote(sys.executable)}"
else:
    PYTHON = "python"
    # Messages propose commands for the user's own PATH.
    os.environ.setdefault(USER_PATH, os.getenv("PATH", ""))
    os.environ.update(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.getenv('PATH', '')}")
    shell.prefix("set -euo pipefail; exec ")


def place(name):
    """Return the folder of a pathvar, below the prefix of a module."""
    return Path(str(workflow.modifier.modify_path(workflow.pathvars.apply(f"<{name}>"))))


RESULTS, LOGS, BENCHMARKS = place("results"), place("logs"), place("benchmarks")
# The package knows whole paths, so Snakemake must not add the prefix once more; a user's own files get none.
workflow.modifier.path_modifier = PathModifier(None, None, workflow)


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
limits = workflow.resource_settings
SHARD_JOBS = workflow.modifier.modify_rulename("embed_shard")
asked = limits.overwrite_resources.get(SHARD_JOBS, {})
# Snakemake does not know its executor yet when it reads this file. A cluster's profile limits the jobs, which on one
# machine would be the cores, and says whether a shard gets a GPU. A cluster's job knows that it is one.
to_cluster = "gpu" in asked and (limits.nodes is not None or workflow.remote_exec)
if "embed_shard" in limits.overwrite_resources and not asked and workflow.is_main_process:
    print(
        f"seqmill: the profile's resources of embed_shard do not count: the rule is {SHARD_JOBS} here",
        file=sys.stderr,
    )

gpu_limit = limits.resources["gpu"] if "gpu" in limits.resources else None

with errors_in_one_line():
    if IS_MODULE and not {"fasta", "datasets"} & config.keys():  # the default is the demo
        raise SeqmillError(
            "nothing to embed: the config of the module has neither datasets nor fasta"
        )
    schema = yaml.safe_load((REPOSITORY / "config/schemas/config.schema.yaml").read_text())
    # As a module, the settings are those of another workflow, which keeps them.
    config = {**config, **check_settings(config, schema, map(str, workflow.configfiles))}
    RUN = Project.open(
        config,
        REPOSITORY,
        cores=limits.cores or 1,
        jobs_get_gpu="gpu" in asked and asked["gpu"] != 0,
        is_main=workflow.is_main_process,
        cluster_threads=limits.overwrite_threads.get(SHARD_JOBS, 1) if to_cluster else None,
        gpus_at_once=getattr(gpu_limit, "value", gpu_limit),
        results=RESULTS,
        logs=LOGS,
        needs_fasta=not IS_MODULE,  # another rule may make it
    )

FOLDER = RunFolder(RESULTS / "{dataset}/{model}", LOGS)
BENCHMARK = BENCHMARKS / "{dataset}/{model}"
SHARD = FOLDER.shard("{rank}", "{world_size}")


def unless_current(files, *outputs):
    """An input that triggers its job when it changes, unless the outputs are what the settings ask for.

    Snakemake would go by modification times and by the jobs that run before; `Project.are_current` compares contents.
    `files` is a path with wildcards, or a function from a dataset to paths.
    """

    def choose(wildcards):
        run = RUN[wildcards]
        found = files(run) if callable(files) else str(files).format(**wildcards)
        made = [Path(str(output).format(**wildcards)) for output in outputs]
        # A FASTA that is made in this run may differ from the one that was compared.
        is_known = files is MARK or not made_by_a_rule(run.fasta)
        return ancient(found) if is_known and RUN.are_current(made) else found

    return choose


def made_by_a_rule(fasta):
    """Return whether another workflow, of which this one is a module, makes a FASTA file."""
    return IS_MODULE and any(rule.is_producer(str(fasta)) for rule in workflow.rules)


def unless_known(fasta):
    """Return a FASTA file as an input that triggers no job, unless a rule makes it. `Project` compares its content."""
    return fasta if made_by_a_rule(fasta) else ancient(fasta)


def unrecorded(value):
    """A param that Snakemake uses but does not record, as it records no function of `threads`.

    So results are not computed again when the repository moves or another device is chosen.
    """
    return lambda wildcards, threads: value


def program(name):
    """The command of a program in scripts/, for the shell."""
    return unrecorded(f"{PYTHON} {shlex.quote(str(REPOSITORY / 'scripts' / name))}")
