# Weights of released models.
#   output: resources/models/{name}.pt, checked; a broken download goes on where it stopped.


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
        "../envs/seqpack.yaml"
    params:
        script=script("fetch_weights.py"),
    shell:
        "python {params.script} --model {wildcards.name} --output {output:q} 2> {log:q}"
