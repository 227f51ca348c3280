# The shards: one worker a rank.
#   input:  results/{dataset}/{model}/index.h5 and the model's weights
#   output: results/{dataset}/{model}/shards/shard_{rank}-of-{world_size}.h5
#   log:    the status JSON beside it. Snakemake deletes the outputs of a failed job but keeps its
#           logs, so the evidence survives, and merge_shards still depends on it.


rule embed_shard:
    input:
        index=unless_current(INDEX, SHARD),
        weights=weights_of,
        mark=unless_current(MARK, SHARD),
    output:
        shard="results/{dataset}/{model}/shards/shard_{rank}-of-{world_size}.h5",
    log:
        status="results/{dataset}/{model}/shards/shard_{rank}-of-{world_size}.status.json",
        text="logs/{dataset}/{model}/embed_shard_{rank}-of-{world_size}.log",
    benchmark:
        "benchmarks/{dataset}/{model}/embed_shard_{rank}-of-{world_size}.benchmark.tsv"
    conda:
        "../envs/seqmill.yaml"
    # A GPU's worker needs one core; without GPUs the shards take turns with all cores.
    threads: 1 if USE_GPU else CORES
    resources:
        gpu=int(USE_GPU),
        mem_mb=shard_memory,
        runtime=shard_runtime,
        attempt=lambda wildcards, attempt: attempt,
    params:
        script=script("embed_shard.py"),
        model=model_of,
        device=unrecorded(config["device"]),
        precision=config["precision"],
        layers=layers_of,
        pooling=config["pooling"],
        residues=f" --per-residue {config['per_residue']}" if config["per_residue"] else "",
        attention=unrecorded(config["attention"]),
        on_error=unrecorded(config["on_error"]),
        save_seconds=unrecorded(config["save_seconds"]),
        audit_seconds=unrecorded(config["audit_seconds"]),
    shell:
        "python {params.script} --index {input.index:q} --model={params.model:q}"
        " --rank {wildcards.rank} --world-size {wildcards.world_size}"
        " --device {params.device} --precision {params.precision} --attention {params.attention}"
        " --layers {params.layers} --pooling {params.pooling}{params.residues}"
        " --on-error {params.on_error} --save-seconds {params.save_seconds}"
        " --audit-seconds {params.audit_seconds} --threads {threads} --parent $PPID"
        " --attempt {resources.attempt} --output {output.shard:q} --status {log.status:q} 2> {log.text:q}"
