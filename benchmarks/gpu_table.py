"""The results of `gpu.py` in Markdown; docs/how-to/gpu.md explains each figure."""

from pathlib import Path

GOALS = {"esm2_t33_650M_UR50D": 450_000, "esm2_t36_3B_UR50D": 115_000}  # tokens/s on an H100 or H200
HOST_GOAL = 0.03


def write_table(results: dict, path: Path) -> None:
    path.write_text(table(results))


def found(results: dict, kind: str) -> list[dict]:
    """Return the results of a kind, in the order in which they were measured."""
    every = (step.get("result") or {} for step in results["steps"].values() if step["state"] == "done")
    return [result for result in every if result.get("kind") == kind]


def table(results: dict) -> str:
    """Return all that was measured so far; seconds are medians over the rounds."""
    parts = [machine_lines, variant_lines, peer_lines, file_lines, profile_lines, left_out_lines]
    return "\n".join(line for part in parts for line in part(results)) + "\n"


def machine_lines(results: dict) -> list[str]:
    lines = []
    for machine in found(results, "machine"):
        peaks = ", ".join(f"{kind} {flops / 1e12:.1f}" for kind, flops in machine["gemm_flops"].items())
        packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
        memory, cores = machine["memory_bytes"] / 1e9, machine["cores"]
        lines += [
            f"{machine['device']}, {memory:.0f} GB, {cores} cores, CUDA {machine['cuda']}, {machine['date']}.",
            f"{packages}.",
            f"GEMM peak with float32 sums, TFLOP/s: {peaks}. Triton kernels: {machine['triton_kernels']}.",
            "",
        ]
    return lines


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def variant_lines(results: dict) -> list[str]:
    variants = found(results, "variant")
    if not variants:
        return []
    machines = found(results, "machine")
    peaks = machines[0]["gemm_flops"] if machines else {}
    lines = [
        "From tokens to embeddings, both on the host; real tokens:",
        "",
        "| model | precision | attention | elementwise | products | tokens/s | of bf16 GEMM peak | host's share "
        "| GPU busy | host, ms/pack | GPU, ms/pack | GPU memory | worst cosine to float32 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in variants:
        rate, busy = one["tokens_per_second"], one.get("gpu_utilization_mean")
        flops = one["flop"] / one["tokens"] * rate
        cells = [
            *(one[key] for key in ("model", "precision", "attention", "elementwise", "products")),
            f"{rate:,.0f}",
            percent(flops / peaks["bfloat16"]) if "bfloat16" in peaks else "",
            percent(one["host_share"]),
            "" if busy is None else f"{busy:.0f} %",
            f"{one['host_seconds'] * 1e3:.2f}",
            f"{one['device_seconds'] * 1e3:.2f}",
            f"{one['peak_bytes'] / 1e9:.1f} GB",
            f"{one['worst_cosine_to_float32']:.7f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if not all(one["runner"] for one in variants):
        lines += ["", "Without h5py: one pack after another, not by the runner."]
    return [*lines, ""]


def ours(results: dict, model: str) -> float | None:
    """Return the tokens/s of the model's default variant."""
    rates = [one["tokens_per_second"] for one in found(results, "variant") if one["model"] == model]
    return rates[0] if rates else None


def peer_lines(results: dict) -> list[str]:
    peers = found(results, "peer")
    if not peers:
        return []
    lines = [
        "The same weights and sequences; the speedup is that of seqmill's default variant:",
        "",
        "| model | peer | precision | attention | tokens/s | padding | speedup of seqmill "
        "| worst cosine to ours in float32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in peers:
        rate = ours(results, one["model"])
        speedup = f"{rate / one['tokens_per_second']:.1f}x" if rate else ""
        cosine = f"{one['worst_cosine_to_ours_in_float32']:.7f}"
        cells = [one["model"], one["peer"], one["precision"], one["attention"], f"{one['tokens_per_second']:,.0f}"]
        lines.append(f"| {' | '.join([*cells, percent(one['padding']), speedup, cosine])} |")
    return [*lines, ""]


def file_lines(results: dict) -> list[str]:
    lines = []
    for run in found(results, "file"):
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in run["stages"].items())
        lines += [
            f"FASTA to HDF5, {run['model']}, bfloat16, {run['attention']}, {run['elementwise']}: {run['sequences']:,} "
            f"sequences, {run['tokens']:,} tokens in {run['seconds']:.1f} s, {run['tokens_per_second']:,.0f} tokens/s "
            f"over all, {run['tokens_per_second_computing']:,.0f} while computing; the GPU had no pack for "
            f"{run['between_packs']:.2%} of that. Seconds by stage: {stages}.",
            "",
        ]
    return lines


def profile_lines(results: dict) -> list[str]:
    lines = []
    for one in found(results, "profile"):
        lines += [
            f"Kernels of {one['model']}, {one['way']}, on the {one['on']}, by torch.profiler, per layer and pack: "
            f"{one['launches_per_layer']:.1f} launches. None ran for {one['host_share']:.1%} of the time.",
            "",
            "| share | µs | launches | kernel |",
            "|---|---|---|---|",
            *(
                f"| {kernel['share']:.1%} | {kernel['us_per_layer']:.1f} | {kernel['launches_per_layer']:.2f} "
                f"| {kernel['name'].replace('|', chr(92) + '|')} |"
                for kernel in one["kernels"]
            ),
            "",
        ]
    return lines


def left_out_lines(results: dict) -> list[str]:
    lines = []
    for state, heading in (("failed", "Failed"), ("left out", "Left out")):
        steps = {name: step for name, step in results["steps"].items() if step["state"] == state}
        lines += [f"{heading}: {name}: {step['why']}." for name, step in steps.items()]
    return [*lines, ""] if lines else []


def short_table(results: dict) -> str:
    """Return one line per model with the goal, what failed, and the number of steps that are done."""
    lines = [f"{'model':22} {'tokens/s':>10} {'goal':>9} {'host':>6} {'from FASTA':>11} {'best peer':>10}"]
    files = {run["model"]: run["tokens_per_second_computing"] for run in found(results, "file")}
    best: dict[str, dict] = {}
    for one in found(results, "variant"):
        if one["tokens_per_second"] > best.get(one["model"], one)["tokens_per_second"] or one["model"] not in best:
            best[one["model"]] = one
    for model, one in best.items():
        peers = [peer["tokens_per_second"] for peer in found(results, "peer") if peer["model"] == model]
        cells = [one["tokens_per_second"], GOALS.get(model), None, files.get(model), max(peers, default=None)]
        rate, goal, _, file, peer = ("" if cell is None else f"{cell:,.0f}" for cell in cells)
        share = percent(one["host_share"])
        lines.append(f"{model:22} {rate:>10} {goal:>9} {share:>6} {file:>11} {peer:>10}  {one['precision']}")
    states = [step["state"] for step in results["steps"].values()]
    counts = {state: states.count(state) for state in ("done", "failed", "left out")}
    lines += [line for line in left_out_lines(results) if line.startswith("Failed")]
    lines.append(", ".join(f"{number} {state}" for state, number in counts.items()))
    return "\n".join(lines)
