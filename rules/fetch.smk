# Weights of released models.
#   output: resources/models/{name}.pt of ESM-2, files in resources/models/{name} of DNABERT, tested against published
#           digests and numbers, with a record next to them ({name}.json). A broken download resumes where it stopped.

from seqmill.spec.models import DNABERT_MODELS, MODELS, RELEASED_FILES


# Only the weights, for a login node that reaches the internet where the compute nodes do not.
rule fetch_models:
    input:
        RUN.weights,


rule fetch_weights:
    output:
        "resources/models/{name}.pt",
    log:
        "logs/fetch_weights/{name}.log",
    benchmark:
        "benchmarks/fetch_weights/{name}.benchmark.tsv"
    wildcard_constraints:
        name="|".join(MODELS),
    conda:
        "../envs/seqmill.yaml"
    params:
        script=script("fetch_weights.py"),
    shell:
        "python {params.script} {wildcards.name} --output {output:q} 2> {log:q}"


rule fetch_folder:
    output:
        # update: Snakemake would remove files that were put there by hand before it fetches the others.
        update(collect("resources/models/{{name}}/{file}", file=RELEASED_FILES)),
    log:
        "logs/fetch_weights/{name}.log",
    benchmark:
        "benchmarks/fetch_weights/{name}.benchmark.tsv"
    wildcard_constraints:
        name="|".join(DNABERT_MODELS),
    conda:
        "../envs/seqmill.yaml"
    params:
        script=script("fetch_weights.py"),
        folder="resources/models/{name}",
    shell:
        "python {params.script} {wildcards.name} --output {params.folder:q} 2> {log:q}"
