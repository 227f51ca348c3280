# Exports: embeddings.h5 in the formats of other programs, those that config's `exports` lists, of each output.
#   input:  results/{dataset}/{model}/embeddings.h5, records.tsv.gz
#   output: results/{dataset}/{model}/exports/{name}.{parquet,npy,h5ad,h5,faiss}, {name}_pt/; a name is that of a
#           dataset in embeddings.h5: embeddings, embeddings_{layer}_{pooling}, residues, residues_{layer}

from seqmill.export.formats import BESIDE, FORMATS
from seqmill.spec.outputs import POOLINGS, dataset_name, residue_dataset


def export_files(export_format):
    """What a format writes: `main`, which the program is told, and what lies beside it."""
    folder = "results/{dataset}/{model}/exports"
    if export_format == "pt":
        return {"main": directory(f"{folder}/{{name}}_pt")}
    extension = "h5" if export_format == "h5_residues" else export_format
    main = f"{folder}/{{name}}.{extension}"
    if export_format in BESIDE:
        return {"main": main, "beside": main + BESIDE[export_format]}
    return {"main": main}


def export_names(dataset, export_format):
    """What is exported of a dataset: names of datasets in embeddings.h5."""
    outputs = outputs_of(dataset)
    if export_format == "h5_residues":
        return [residue_dataset(layer, layer == outputs.layers[0]) for layer in outputs.layers]
    return [dataset_name(*pair, pair == outputs.pairs[0]) for pair in outputs.pairs]


def export_options(wildcards):
    """The options of export.py that choose the output of a name."""
    _, *layer_and_pooling = wildcards.name.split("_", 2)
    options = zip(("--layer", "--pooling"), layer_and_pooling)
    return " ".join(f"{option} {value}" for option, value in options)


EXPORTS = [
    # As text: it is no output here, of which alone Snakemake wants to know that it is a folder.
    str(export_files(export_format)["main"]).format(
        dataset=dataset.name, model=dataset.model.slug, name=name
    )
    for dataset in DATASETS.values()
    for export_format in config["exports"]
    for name in export_names(dataset, export_format)
]

for export_format in FORMATS:

    rule:
        name:
            f"export_{export_format}"
        input:
            embeddings="results/{dataset}/{model}/embeddings.h5",
            records="results/{dataset}/{model}/records.tsv.gz",
        output:
            **export_files(export_format),
        log:
            f"logs/{{dataset}}/{{model}}/export_{export_format}_{{name}}.log",
        benchmark:
            f"benchmarks/{{dataset}}/{{model}}/export_{export_format}_{{name}}.benchmark.tsv"
        wildcard_constraints:
            name=(
                r"residues(_-?\d+)?"
                if export_format == "h5_residues"
                else rf"embeddings(_-?\d+_({'|'.join(POOLINGS)}))?"
            ),
        conda:
            "../envs/export.yaml"
        resources:
            mem_mb=lambda wildcards, attempt: 4000 * attempt,
            runtime=lambda wildcards, input, attempt: rewriting_minutes(
                [Path(input.embeddings)], attempt
            ),
        params:
            script=script("export.py"),
            format=export_format,
            output=export_options,
        shell:
            "python {params.script} --embeddings {input.embeddings:q} --records {input.records:q}"
            " --format {params.format} {params.output} --output {output.main:q} 2> {log:q}"
