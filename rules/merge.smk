# The merge: every shard verified, then one file in the order of the FASTA.
#   input:  results/{dataset}/{model}/index.h5, the shards and their status JSONs; the results that the index reuses
#   output: results/{dataset}/{model}/embeddings.h5, records.tsv.gz, manifest.json


rule merge_shards:
    input:
        index=unless_current(INDEX, *MERGED),
        shards=shards_of,
        statuses=statuses_of,
        mark=unless_current(MARK, *MERGED),
    output:
        embeddings="results/{dataset}/{model}/embeddings.h5",
        records="results/{dataset}/{model}/records.tsv.gz",
        manifest="results/{dataset}/{model}/manifest.json",
    log:
        "logs/{dataset}/{model}/merge_shards.log",
    benchmark:
        "benchmarks/{dataset}/{model}/merge_shards.benchmark.tsv"
    conda:
        "../envs/seqmill.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=lambda wildcards, input, attempt: rewriting_minutes(
            map(Path, input.shards), attempt
        ),
    params:
        script=script("merge_shards.py"),
        dtype=config["dtype"],
        fasta=fasta_to_merge,
    shell:
        "python {params.script} --index {input.index:q} --shards {input.shards:q}"
        " --statuses {input.statuses:q} --output {output.embeddings:q}"
        " --dtype {params.dtype} --fasta={params.fasta:q} --records {output.records:q} --manifest {output.manifest:q} 2> {log:q}"
