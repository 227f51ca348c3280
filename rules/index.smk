# The index: every record accounted for, unique sequences tokenized and sorted, packs assigned.
#   input:  the dataset's FASTA file, for nucleotides also the model's tokenizer; config's `reuse`
#   output: results/{dataset}/{model}/index.h5


rule build_index:
    input:
        fasta=lambda wildcards: unless_known(RUN[wildcards].fasta),
        tokenizer=ancient(lambda wildcards: RUN[wildcards].tokenizer),
        mark=unless_current(MARK, FOLDER.index),
    output:
        index=FOLDER.index,
    log:
        FOLDER.index_log,
    benchmark:
        BENCHMARK / "build_index.benchmark.tsv"
    retries: 0  # the same error would follow
    conda:
        "../envs/seqmill.yaml"
    threads: lambda wildcards: RUN[wildcards].index_threads
    resources:
        mem_mb=lambda wildcards: RUN[wildcards].index_memory,
        runtime=lambda wildcards: RUN[wildcards].index_minutes,
    params:
        program=program("build_index.py"),
        model=lambda wildcards: RUN[wildcards].model.name,
        policy=lambda wildcards: RUN[wildcards].length_options,
        on_invalid=unrecorded(config["on_invalid"]),
        # A missing input would make Snakemake skip the rebuild, so these are params.
        reuse=lambda wildcards: list(map(str, RUN[wildcards].reused)),
        reused_fingerprints=lambda wildcards: list(RUN[wildcards].reused.values()),
    shell:
        "{params.program} --fasta={input.fasta:q} --model={params.model:q}"
        " {params.policy} --on-invalid {params.on_invalid} --reuse {params.reuse:q} --threads {threads} --output {output.index:q} 2> {log:q}"
