# FASTA files to language-model embeddings.
#
#   config/datasets.tsv ─► index.h5 ─► shard_{rank}-of-{W}.h5 ─► embeddings.h5 ─► exports, report.html
#
# Settings: config/config.yaml, explained in docs/reference/settings.md. Results: results/{dataset}/{model}/.

import threading

from snakemake.utils import min_version

min_version("9.19")


pathvars:
    # The repository has a folder of that name.
    benchmarks="<logs>/benchmarks",


include: "rules/repository.smk"


# The working directory's own settings, or else those of the workflow.
configfile: "config/config.yaml" if exists("config/config.yaml") else REPOSITORY / "config/config.yaml"


include: "rules/common.smk"


if not IS_MODULE:

    report: "report/workflow.rst"


# Used with --software-deployment-method apptainer.
if config["container"]:

    container: config["container"]


# The first rule, so it is the default target.
rule all:
    input:
        RUN.targets,
    localrule: True


include: "rules/fetch.smk"
include: "rules/index.smk"
include: "rules/embed.smk"
include: "rules/merge.smk"
include: "rules/export.smk"
include: "rules/report.smk"
include: "rules/plan.smk"


onstart:
    from seqmill.base.commands import command
    from seqmill.run.slurm_jobs import stop_orphans
    from seqmill.run.summary import stamps_of

    # Globals of the whole workflow: the file must stay open until the run ends.
    global in_use, parts, stamps
    with errors_in_one_line():
        RUN.require_reused(
            Path(file) for job in workflow.dag.needrun_jobs() for file in job.output
        )
        in_use = stop_orphans(Path())
    # After the jobs that an earlier run has left, which may write to their logs.
    parts = ["fetch_weights", *(run.folder.name for run in RUN)]
    stamps = stamps_of(RESULTS, LOGS, parts)
    print(
        f"Progress of the shards: {command('watch', str(RESULTS.absolute()))}", file=sys.stderr
    )
    seconds = 30 if sys.stderr.isatty() else 600
    threading.Thread(
        target=print_progress, args=(RESULTS, parts, seconds, sys.stderr), daemon=True
    ).start()


onsuccess:
    from seqmill.run.summary import results_message

    print(results_message(RUN, is_elsewhere=workflow.overwrite_workdir is not None))
    # Snakemake's scheduler starts one after each job, and Snakemake 9.27 would wait for the last, a second.
    for timer in threading.enumerate():
        if isinstance(timer, threading.Timer) and timer.function.__module__.startswith(
            "snakemake."
        ):
            timer.cancel()


onerror:
    from seqmill.run.summary import failure_message

    # Snakemake prints this after the logs of all failed jobs.
    if message := failure_message(RESULTS, LOGS, parts, stamps):
        print(f"\n{message}\n", file=sys.stderr)
