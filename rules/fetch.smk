# Weights of released models.
#   output: resources/models/{name}.pt of ESM-2, files in resources/models/{name} of other models, tested against
#           published digests and numbers, with a record next to them ({name}.json). A broken download resumes where it
#           stopped. Weights in the user's folder are used where they are (`find_model` in seqmill/spec/models.py).

from seqmill.spec.models import ESM2_MODELS
from seqmill.spec.released import read_releases

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
        name="|".join(ESM2_MODELS),
    retries: 0  # the program itself waits and tries again
    localrule: True
    conda:
        "../envs/seqmill.yaml"
    params:
        program=program("fetch_weights.py"),
    shell:
        "{params.program} {wildcards.name} --output {output:q} 2> {log:q}"


# One rule for each folder, because their files differ.
for model, release in read_releases().items():
    if model not in ESM2_MODELS:

        rule:
            name:
                f"fetch_{model}"
            output:
                # update: Snakemake would remove files that were put there by hand before it fetches the others.
                update([f"resources/models/{model}/{file}" for file in release.files]),
            log:
                LOGS / f"fetch_weights/{model}.log",
            benchmark:
                BENCHMARKS / f"fetch_weights/{model}.benchmark.tsv"
            retries: 0  # the program itself waits and tries again
            localrule: True
            conda:
                "../envs/seqmill.yaml"
            params:
                program=program("fetch_weights.py"),
                model=model,
                folder=lambda wildcards, output: Path(output[0]).parent,
            shell:
                "{params.program} {params.model} --output {params.folder:q} 2> {log:q}"
