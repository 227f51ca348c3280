# The shards: one worker per rank.
#   input:  results/{dataset}/{model}/index.h5 and the model's weights
#   output: results/{dataset}/{model}/shards/shard_{rank}-of-{world_size}.h5
#   log:    the shard's status JSON. Snakemake deletes the outputs of a failed job but keeps its logs, so the evidence
#           survives, and merge_shards can still depend on it.


rule embed_shard:
    input:
        index=unless_current(FOLDER.index, SHARD),
        weights=ancient(lambda wildcards: RUN[wildcards].model.files),
        mark=unless_current(MARK, SHARD),
    output:
        shard=SHARD,
    log:
        status=status_path_of(SHARD),
        text=FOLDER.shard_log(SHARD),
    benchmark:
        BENCHMARK / "embed_shard_{rank}-of-{world_size}.benchmark.tsv"
    conda:
        "../envs/seqmill.yaml"
    threads: lambda wildcards: RUN[wildcards].shard_threads
    resources:
        gpu=lambda wildcards: int(RUN[wildcards].use_gpu),
        mem_mb=lambda wildcards, threads, attempt: RUN[wildcards].shard_memory(threads, attempt),
        runtime=lambda wildcards, threads, attempt: RUN[wildcards].shard_minutes(
            int(wildcards.world_size), threads, attempt
        ),
        attempt=lambda wildcards, attempt: attempt,
    params:
        program=program("embed_shard.py"),
        model=lambda wildcards: RUN[wildcards].model.name,
        device=unrecorded(config["device"]),
        precision=config["precision"],
        layers=lambda wildcards: RUN[wildcards].layers,
        pooling=config["pooling"],
        residues=f" --per-residue {config['per_residue']}" if config["per_residue"] else "",
        attention=unrecorded(config["attention"]),
        on_error=unrecorded(config["on_error"]),
        save_seconds=unrecorded(config["save_seconds"]),
        audit_seconds=unrecorded(config["audit_seconds"]),
    shell:
        "{params.program} --index {input.index:q} --model={params.model:q}"
        " --rank {wildcards.rank} --world-size {wildcards.world_size}"
        " --device {params.device} --precision {params.precision} --attention {params.attention}"
        " --layers {params.layers} --pooling {params.pooling}{params.residues}"
        " --on-error {params.on_error} --save-seconds {params.save_seconds}"
        " --audit-seconds {params.audit_seconds} --threads {threads} --parent $PPID"
        " --attempt {resources.attempt} --output {output.shard:q} --status {log.status:q} 2> {log.text:q}"
