# The report: one page on a result, which opens without a network; `snakemake --report` includes it.
#   input:  results/{dataset}/{model}/embeddings.h5, records.tsv.gz, manifest.json; config's `metadata`
#   output: results/{dataset}/{model}/report.html

REPORTS = [f"results/{name}/{slug}/report.html" for name, slug in DATASETS]


rule report:
    input:
        embeddings="results/{dataset}/{model}/embeddings.h5",
        records="results/{dataset}/{model}/records.tsv.gz",
        manifest="results/{dataset}/{model}/manifest.json",
        metadata=config["metadata"] or [],
    output:
        page=report(
            "results/{dataset}/{model}/report.html",
            caption="report.rst",
            category="Embeddings",
            labels={"dataset": "{dataset}", "model": "{model}"},
        ),
    log:
        "logs/{dataset}/{model}/report.log",
    benchmark:
        "benchmarks/{dataset}/{model}/report.benchmark.tsv"
    conda:
        "../envs/seqmill.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=lambda wildcards, attempt: 60 * attempt,
    params:
        script=script("report.py"),
        colors=lambda wildcards, input: (
            f"--metadata {shlex.quote(input.metadata)} --color {shlex.quote(config['color'])}"
            if config["metadata"]
            else ""
        ),
    shell:
        "python {params.script} --embeddings {input.embeddings:q} --records {input.records:q}"
        " --manifest {input.manifest:q} {params.colors} --output {output.page:q} 2> {log:q}"
