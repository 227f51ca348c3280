# The plan: what embedding will take, measured where the shards will be computed. Nothing is embedded, and of the
# weights nothing is fetched: untrained ones are as fast. `snakemake plan` prints it. The index of a run is neither read
# nor written: a plan with other settings must leave finished results alone.
#   input:  those of build_index; from them an index is built in a temporary folder beside the results
#   output: results/{dataset}/{model}/plan.txt, removed once it is printed, so that none is ever out of date

PLANS = [f"results/{name}/{slug}/plan.txt" for name, slug in DATASETS]


rule plan_shards:
    input:
        fasta=fasta_of,
        tokenizer=tokenizer_of,
    output:
        plan="results/{dataset}/{model}/plan.txt",
    # Not in logs/{dataset}/{model}, by which seqmill.run.watch knows a run that has begun.
    log:
        "logs/plan/{dataset}/{model}.log",
    benchmark:
        "benchmarks/{dataset}/{model}/plan_shards.benchmark.tsv"
    conda:
        "../envs/seqmill.yaml"
    # As of embed_shard, whose speed is measured.
    threads: 1 if USE_GPU else CORES
    resources:
        gpu=int(USE_GPU),
        mem_mb=plan_memory,
        runtime=index_runtime,  # which leaves an hour for what is not the index
    params:
        script=script("plan.py"),
        model=model_of,
        policy=length_policy_of,
        reuse=reused_of,
        results="results/{dataset}/{model}",
        world_size=lambda wildcards: WORLD_SIZES[wildcards.dataset, wildcards.model],
        device=config["device"],
        precision=config["precision"],
        attention=config["attention"],
        layers=config["layers"],
        pooling=config["pooling"],
        residues=f" --per-residue {config['per_residue']}" if config["per_residue"] else "",
        dtype=config["dtype"],
    shell:
        "python {params.script} --fasta={input.fasta:q} --model={params.model:q}"
        " {params.policy} --reuse {params.reuse:q} --results={params.results:q}"
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
        "../envs/seqmill.yaml"
    shell:
        # The files are not temp(): Snakemake keeps what a target that is asked for depends on. Folders that hold
        # nothing else go as well.
        """
        sh -ec 'for plan; do echo; cat "$plan"; done; rm "$@"
        for plan; do rmdir -p "${{plan%/*}}" 2>/dev/null || :; done' - {input:q} 2>{log:q}
        """
