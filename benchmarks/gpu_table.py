"""The results of `gpu.py` in Markdown."""

import statistics


def table(results: dict) -> str:
    """Return what has been measured so far; seconds are medians over the rounds."""
    peaks = ", ".join(f"{kind} {flops / 1e12:.0f}" for kind, flops in results["gemm_flops"].items())
    return "\n".join(
        [
            f"{results['device']}, torch {results['torch']}, {results['date']}. GEMM peak, TFLOP/s: {peaks}.",
            "",
            *model_lines(results),
            *file_lines(results),
            *peer_lines(results),
            *(f"Left out: {name}." for name in results["left_out"]),
            "",
        ]
    )


def model_lines(results: dict) -> list[str]:
    lines = [
        "From the index's tokens to embeddings on the host, real tokens. GPU busy is NVML's utilization; host and",
        "GPU ms are of one pack alone, queued and computed.",
        "",
        "| model | precision | attention | elementwise | tokens/s | of GEMM peak | GPU busy | host, ms/pack "
        "| GPU, ms/pack | GPU memory | worst cosine to float32 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, measured in results["models"].items():
        for way in measured["ways"]:
            seconds = statistics.median(way["seconds"])
            peak = results["gemm_flops"][way["precision"]]
            busy, cosine = way.get("gpu_utilization_mean"), way["worst_cosine_to_float32"]
            lines.append(
                f"| {name} | {way['precision']} | {way['attention']} | {way['elementwise']} "
                f"| {measured['tokens'] / seconds:,.0f} | {measured['flop'] / seconds / peak:.0%} "
                f"| {'' if busy is None else f'{busy:.0f} %'} | {way['host_seconds'] * 1e3:.2f} "
                f"| {way['device_seconds'] * 1e3:.2f} | {way['peak_bytes'] / 1e9:.1f} GB "
                f"| {'' if cosine is None else f'{cosine:.7f}'} |"
            )
    return [*lines, ""]


def file_lines(results: dict) -> list[str]:
    run = results.get("file")
    if not run:
        return []
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in run["stages"].items())
    return [
        f"FASTA to HDF5, {run['model']}, bfloat16: {run['sequences']:,} sequences, {run['tokens']:,} tokens in "
        f"{run['seconds']:.1f} s, {run['tokens'] / run['seconds']:,.0f} tokens/s over all. Seconds by stage: {stages}.",
        "",
    ]


def peer_lines(results: dict) -> list[str]:
    peers = results.get("peers", {"seconds": {}})
    if not peers["seconds"]:
        return []
    ours = next((seconds for name, seconds in peers["seconds"].items() if name.startswith("seqmill")), None)
    lines = [
        f"{peers['model']}, {peers['sequences']:,} proteins, {peers['tokens']:,} tokens; embedding alone, no loading:",
        "",
        "| contender | seconds | tokens/s | speedup of seqmill |",
        "|---|---|---|---|",
    ]
    for name, seconds in peers["seconds"].items():
        ratio = f"{seconds / ours:.1f}x" if ours else ""
        lines.append(f"| {name} | {seconds:.2f} | {peers['tokens'] / seconds:,.0f} | {ratio} |")
    return [*lines, ""]
