# The report: one page about a result, which needs no network; `snakemake --report` includes it.
#   input:  results/{dataset}/{model}/embeddings.h5, records.tsv.gz, manifest.json; config's `metadata`
#   output: results/{dataset}/{model}/report.html


rule report:
    input:
        embeddings=FOLDER.embeddings,
        records=FOLDER.records,
        manifest=FOLDER.manifest,
        metadata=config["metadata"] or [],
    output:
        page=report(
            FOLDER.report,
            caption="../report/result.rst",
            category="Embeddings",
            labels={"dataset": "{dataset}", "model": "{model}"},
        ),
    log:
        FOLDER.logs / "report.log",
    benchmark:
        BENCHMARK / "report.benchmark.tsv"
    conda:
        "../envs/seqmill.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=lambda wildcards, attempt: 60 * attempt,
    params:
        program=program("report.py"),
        colors=lambda wildcards, input: (
            f"--metadata {shlex.quote(input.metadata)} --color {shlex.quote(config['color'])}"
            if input.metadata
            else ""
        ),
    shell:
        "{params.program} --embeddings {input.embeddings:q} --records {input.records:q}"
        " --manifest {input.manifest:q} {params.colors} --output {output.page:q} 2> {log:q}"
