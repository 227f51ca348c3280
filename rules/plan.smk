# The plan: what embedding will take, measured where the shards will be computed. Nothing is embedded, and of the
# model nothing is fetched: untrained weights are as fast. `snakemake plan` prints it.
#   input:  results/{dataset}/{model}/index.h5, built if it is not there and kept for the run
#   output: results/{dataset}/{model}/plan.txt, removed once it is printed, so that none is ever out of date

PLANS = [f"results/{name}/{slug}/plan.txt" for name, slug in DATASETS]


rule plan_shards:
    input:
        index="results/{dataset}/{model}/index.h5",
    output:
        plan="results/{dataset}/{model}/plan.txt",
    log:
        "logs/{dataset}/{model}/plan_shards.log",
    benchmark:
        "benchmarks/{dataset}/{model}/plan_shards.benchmark.tsv"
    conda:
        "../envs/seqpack.yaml"
    # As of embed_shard, whose speed is measured.
    threads: 1 if USE_GPU else CORES
    resources:
        gpu=int(USE_GPU),
        mem_mb=shard_memory,
        runtime=lambda wildcards, attempt: 60 * attempt,
    params:
        script=script("plan.py"),
        model=model_of,
        world_size=lambda wildcards: WORLD_SIZES[wildcards.dataset, wildcards.model],
        device=config["device"],
        precision=config["precision"],
        attention=config["attention"],
        layers=config["layers"],
        pooling=config["pooling"],
        residues=f" --per-residue {config['per_residue']}" if config["per_residue"] else "",
        dtype=config["dtype"],
    shell:
        "python {params.script} --index {input.index:q} --model={params.model:q}"
        " --world-size {params.world_size} --device {params.device} --precision {params.precision}"
        " --attention {params.attention} --threads {threads}"
        " --layers {params.layers} --pooling {params.pooling}{params.residues} --dtype {params.dtype}"
        " > {output.plan:q} 2> {log:q}"


rule plan:
    input:
        PLANS,
    log:
        "logs/plan.log",
    conda:
        "../envs/seqpack.yaml"
    shell:
        # The files are not temp(): Snakemake keeps what a target that is asked for depends on.
        """
        sh -c 'for plan; do echo; cat "$plan"; done; rm "$@"' - {input:q} 2>{log:q}
        """
