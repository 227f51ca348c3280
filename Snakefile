# FASTA files to language-model embeddings.
#
#   config/datasets.tsv ─► index.h5 ─► shard_{rank}-of-{W}.h5 ─► embeddings.h5
#
# Settings: config/config.yaml, explained in config/README.md. Results: results/{dataset}/{model}/.

import time

from snakemake.utils import min_version

min_version("9.19")
STARTED = time.time()


# A copy of the settings in the working directory counts before the workflow's own.
configfile: "config/config.yaml" if exists("config/config.yaml") else f"{workflow.basedir}/config/config.yaml"


include: "rules/common.smk"
include: "rules/resources.smk"


# Used with --software-deployment-method apptainer.
if config["container"]:

    container: config["container"]


include: "rules/fetch.smk"
include: "rules/index.smk"
include: "rules/embed.smk"
include: "rules/merge.smk"
include: "rules/export.smk"
include: "rules/report.smk"
include: "rules/plan.smk"


localrules:
    all,
    fetch_folder,
    fetch_models,
    fetch_weights,
    plan,


rule all:
    default_target: True
    input:
        EMBEDDINGS,
        EXPORTS,
        REPORTS,
        SHARDS,


# Fetch the weights alone, e.g. where only the login node reaches the internet.
rule fetch_models:
    input:
        WEIGHTS,


onstart:
    # A name of the whole workflow's: the file is to stay open until the run ends.
    global in_use
    require_reused()
    in_use = stop_orphans()


onsuccess:
    print(results_message())


onerror:
    from seqmill.run.messages import failure_message

    names = ["fetch_weights", *map("/".join, DATASETS)]
    # Below what Snakemake shows of every log.
    if message := failure_message(Path(), names, STARTED):
        print(f"\n{message}\n", file=sys.stderr)
