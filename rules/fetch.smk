# Weights of released models.
#   output: resources/models/{name}.pt of ESM-2, files in resources/models/{name} of DNABERT, tested against published
#           digests and numbers, with a record next to them ({name}.json). A broken download resumes where it stopped.
#           Weights in the user's folder are used where they are (`find_model` in seqmill/spec/models.py).

from seqmill.spec.models import DNABERT_MODELS, MODELS, RELEASED_FILES

# Snakemake knows its targets only later, and would say that there is nothing to be done.
if "fetch_models" in sys.argv and workflow.is_main_process:
    with errors_in_one_line():
        for line in RUN.describe_weights():
            print(f"seqmill: {line}", file=sys.stderr)


# Only the weights, for a login node that reaches the internet where the compute nodes do not.
rule fetch_models:
    input:
        RUN.weights,
    localrule: True


rule fetch_weights:
    output:
        "resources/models/{name}.pt",
    log:
        LOGS / "fetch_weights/{name}.log",
    benchmark:
        BENCHMARKS / "fetch_weights/{name}.benchmark.tsv"
    wildcard_constraints:
        name="|".join(MODELS),
    retries: 0  # the program itself waits and tries again
    localrule: True
    conda:
        "../envs/seqmill.yaml"
    params:
        program=program("fetch_weights.py"),
    shell:
        "{params.program} {wildcards.name} --output {output:q} 2> {log:q}"


rule fetch_folder:
    output:
        # update: Snakemake would remove files that were put there by hand before it fetches the others.
        update(collect("resources/models/{{name}}/{file}", file=RELEASED_FILES)),
    log:
        LOGS / "fetch_weights/{name}.log",
    benchmark:
        BENCHMARKS / "fetch_weights/{name}.benchmark.tsv"
    wildcard_constraints:
        name="|".join(DNABERT_MODELS),
    retries: 0  # the program itself waits and tries again
    localrule: True
    conda:
        "../envs/seqmill.yaml"
    params:
        program=program("fetch_weights.py"),
        folder="resources/models/{name}",
    shell:
        "{params.program} {wildcards.name} --output {params.folder:q} 2> {log:q}"
