# Exports: embeddings.h5 in the formats that config's `exports` lists, for each of its outputs.
#   input:  results/{dataset}/{model}/embeddings.h5, records.tsv.gz
#   output: results/{dataset}/{model}/exports/{name}.{parquet,npy,csv,tsv,h5ad,h5,faiss}, {name}_pt/; a name is that of a
#           dataset in embeddings.h5: embeddings, embeddings_{layer}_{pooling}, residues, residues_{layer}

from seqmill.export.formats import BESIDE, FORMATS
from seqmill.run.dataset_run import export_options, export_path
from seqmill.run.resources import rewriting_minutes
from seqmill.spec.outputs import POOLINGS

for export_format in FORMATS:
    export = str(export_path(FOLDER.path, "{name}", export_format))

    rule:
        name:
            f"export_{export_format}"
        input:
            embeddings=FOLDER.embeddings,
            records=FOLDER.records,
        output:
            main=directory(export) if export_format == "pt" else export,
            beside=[export + BESIDE[export_format]] if export_format in BESIDE else [],
        log:
            FOLDER.logs / f"export_{export_format}_{{name}}.log",
        benchmark:
            BENCHMARK / f"export_{export_format}_{{name}}.benchmark.tsv"
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
            runtime=lambda wildcards, input, attempt: attempt
            * rewriting_minutes([Path(input.embeddings)]),
        params:
            program=program("export.py"),
            format=export_format,
            output=lambda wildcards: export_options(wildcards.name),
        shell:
            "{params.program} --embeddings {input.embeddings:q} --records {input.records:q}"
            " --format {params.format} {params.output} --output {output.main:q} 2> {log:q}"
