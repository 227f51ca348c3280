# Exports: embeddings.h5 in the formats of other programs, those that config's `exports` lists.
#   input:  results/{dataset}/{model}/embeddings.h5, records.tsv.gz
#   output: results/{dataset}/{model}/exports/embeddings.{parquet,npy,h5ad,h5,faiss}, residues.h5,
#           embeddings_pt/


def export_files(export_format):
    """What a format writes: `main`, which the program is told, and what lies beside it."""
    folder = "results/{dataset}/{model}/exports"
    main = f"{folder}/embeddings.{export_format}"
    if export_format == "pt":
        return {"main": directory(f"{folder}/embeddings_pt")}
    if export_format == "h5_residues":
        return {"main": f"{folder}/residues.h5", "ids": f"{folder}/residues.h5.names.tsv"}
    beside = {"npy": ".ids.txt", "faiss": ".ids.txt", "h5": ".names.tsv"}
    if export_format in beside:
        return {"main": main, "ids": main + beside[export_format]}
    return {"main": main}


EXPORTS = [
    export_files(export_format)["main"].format(dataset=name, model=slug)
    for name, slug in DATASETS
    for export_format in config["exports"]
]

for export_format in ("parquet", "npy", "h5ad", "h5", "h5_residues", "faiss", "pt"):

    rule:
        name:
            f"export_{export_format}"
        input:
            embeddings="results/{dataset}/{model}/embeddings.h5",
            records="results/{dataset}/{model}/records.tsv.gz",
        output:
            **export_files(export_format),
        log:
            f"logs/{{dataset}}/{{model}}/export_{export_format}.log",
        benchmark:
            f"benchmarks/{{dataset}}/{{model}}/export_{export_format}.benchmark.tsv"
        conda:
            "../envs/export.yaml"
        resources:
            mem_mb=lambda wildcards, attempt: 4000 * attempt,
            runtime=lambda wildcards, attempt: 120 * attempt,
        params:
            script=script("export.py"),
            format=export_format,
        shell:
            "python {params.script} --embeddings {input.embeddings:q} --records {input.records:q}"
            " --format {params.format} --output {output.main:q} 2> {log:q}"
