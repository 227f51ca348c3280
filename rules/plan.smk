# The forecast that `snakemake plan` prints: what embedding will take, measured where the shards will be computed. Nothing
# is embedded and no weights are fetched, as untrained ones are as fast. The index of a run is neither read nor written:
# a plan with other settings must leave finished results alone.
#   input:  those of build_index; from them an index is built in a temporary folder in the results folder
#   output: results/{dataset}/{model}/plan.txt, removed once it is printed, so that it is never out of date

PLAN = FOLDER.path / "plan.txt"


rule plan_shards:
    input:
        fasta=rules.build_index.input.fasta,
        tokenizer=rules.build_index.input.tokenizer,
    output:
        plan=PLAN,
    # Not in logs/{dataset}/{model}: for seqmill.run.walk that folder means that a run has begun.
    log:
        LOGS / "plan/{dataset}/{model}.log",
    benchmark:
        BENCHMARK / "plan_shards.benchmark.tsv"
    retries: 0
    conda:
        "../envs/seqmill.yaml"
    # As embed_shard, whose speed is measured.
    threads: lambda wildcards: RUN[wildcards].shard_threads
    resources:
        gpu=lambda wildcards: int(RUN[wildcards].use_gpu),
        # Enough for build_index, then for a worker.
        mem_mb=lambda wildcards, threads: max(
            RUN[wildcards].index_memory, RUN[wildcards].shard_memory(threads, 1)
        ),
        # This leaves an hour for everything but the index.
        runtime=lambda wildcards: RUN[wildcards].index_minutes,
    params:
        program=program("plan.py"),
        model=lambda wildcards: RUN[wildcards].model.name,
        policy=lambda wildcards: RUN[wildcards].length_options,
        on_invalid=unrecorded(config["on_invalid"]),
        reuse=lambda wildcards: list(map(str, RUN[wildcards].reused)),
        results=str(FOLDER.path),
        world_size=lambda wildcards: RUN[wildcards].world_size,
        device=config["device"],
        precision=config["precision"],
        attention=config["attention"],
        layers=config["layers"],
        pooling=config["pooling"],
        residues=rules.embed_shard.params.residues,
        dtype=config["dtype"],
    shell:
        "{params.program} --fasta={input.fasta:q} --model={params.model:q}"
        " {params.policy} --on-invalid {params.on_invalid} --reuse {params.reuse:q} --results={params.results:q}"
        " --world-size {params.world_size} --device {params.device} --precision {params.precision}"
        " --attention {params.attention} --threads {threads}"
        " --layers {params.layers} --pooling {params.pooling}{params.residues} --dtype {params.dtype}"
        " > {output.plan:q} 2> {log:q}"


rule plan:
    input:
        collect(PLAN, zip, dataset=[run.name for run in RUN], model=[run.model.slug for run in RUN]),
    log:
        LOGS / "plan.log",
    localrule: True
    conda:
        "../envs/seqmill.yaml"
    shell:
        # The files are not temp(): Snakemake keeps the inputs of a target rule. Folders that are empty then go as well.
        """
        sh -ec 'for plan; do echo; cat "$plan"; done; rm "$@"
        for plan; do rmdir -p "${{plan%/*}}" 2>/dev/null || :; done' - {input:q} 2>{log:q}
        """
