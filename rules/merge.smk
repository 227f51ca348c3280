# The merge: every shard verified, then one file in the order of the FASTA.
#   input:  results/{dataset}/{model}/index.h5, the shards and their status JSONs; the results that the index reuses
#   output: results/{dataset}/{model}/embeddings.h5, records.tsv.gz, manifest.json

from seqmill.run.resources import rewriting_minutes


rule merge_shards:
    input:
        index=unless_current(FOLDER.index, *FOLDER.merged),
        shards=unless_current(lambda run: run.shards, *FOLDER.merged),
        statuses=unless_current(lambda run: run.statuses, *FOLDER.merged),
        mark=unless_current(MARK, *FOLDER.merged),
    output:
        embeddings=FOLDER.embeddings,
        records=FOLDER.records,
        manifest=FOLDER.manifest,
    log:
        FOLDER.merge_log,
    benchmark:
        BENCHMARK / "merge_shards.benchmark.tsv"
    conda:
        "../envs/seqmill.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=lambda wildcards, input, attempt: attempt
        * rewriting_minutes(map(Path, input.shards)),
    params:
        program=program("merge_shards.py"),
        dtype=config["dtype"],
        # Not recorded, as it is a function of `threads`: another name of the FASTA is no reason to merge again.
        fasta=lambda wildcards, threads: str(RUN[wildcards].fasta),
    shell:
        "{params.program} --index {input.index:q} --shards {input.shards:q}"
        " --statuses {input.statuses:q} --output {output.embeddings:q}"
        " --dtype {params.dtype} --fasta={params.fasta:q} --records {output.records:q} --manifest {output.manifest:q} 2> {log:q}"
