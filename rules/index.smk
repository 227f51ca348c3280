# The index: every record accounted for, unique sequences tokenized and sorted, packs planned.
#   input:  the FASTA file of the dataset; of nucleotides also the model's tokenizer; config's `reuse`
#   output: results/{dataset}/{model}/index.h5


rule build_index:
    input:
        fasta=fasta_of,
        tokenizer=tokenizer_of,
        mark=unless_current(MARK, INDEX),
    output:
        index="results/{dataset}/{model}/index.h5",
    log:
        "logs/{dataset}/{model}/build_index.log",
    benchmark:
        "benchmarks/{dataset}/{model}/build_index.benchmark.tsv"
    conda:
        "../envs/seqmill.yaml"
    # Byte pairs are found on all cores, letters of proteins on one.
    threads: index_threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=index_runtime,
    params:
        script=script("build_index.py"),
        model=model_of,
        policy=length_policy_of,
        # No input: of those, one that is gone would let Snakemake pass over what is to be done anew.
        reuse=reused_of,
        reused_fingerprints=reused_fingerprints_of,
    shell:
        "python {params.script} --fasta={input.fasta:q} --model={params.model:q}"
        " {params.policy} --reuse {params.reuse:q} --threads {threads} --output {output.index:q} 2> {log:q}"
