"""The report's section on the computation: its shards, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from seqmill.base.words import duration, many, percent, written
from seqmill.report.charts import bars, histogram, spans, steps
from seqmill.report.tables import facts, figure, table

MAX_BARS = 16  # shards; more are drawn as columns
MAX_LISTED = 100  # shards in the table

DETOURS = {
    "out_of_memory_splits": "packs split for lack of memory",
    "sequences_on_cpu": "sequences left to the CPU",
    "recomputed_float32": "sequences recomputed in float32",
}
# What is drawn by shard: title, unit, caption.
BY_SHARD = {
    "num_tokens": ("tokens", "", "Tokens in each shard."),
    "tokens_per_second": ("tokens/s", " tokens/s", "Speed of each shard, of the packs that its last attempt computed."),
    "gpu_utilization_mean": ("GPU use (%)", " %", "Use of the GPU while computing: the mean of NVML's samples."),
}
GB = 1e9

Shards = Sequence[dict[str, Any]]


def computation(data: dict[str, Any]) -> str:
    """Return the section on how the embeddings were computed, as HTML; empty where nothing is known of it."""
    shards, packs = data["shards"], data["packs"]
    known = [("computed by", "; ".join(kinds_of(data))), *_facts(shards)]
    if packs:
        known.append(("packs", f"{packs['number']:,} of at most {packs['pack_tokens']:,} tokens or one sequence"))
        known.append(("pack fill", percent(packs["fill"])))
    else:
        known.append(("packs", written(data["counts"]["packs"], "{:,}")))
    if not any(text for _, text in known):
        return ""
    parts = ["<h2>Computation</h2>", facts(known), *_over_time(data["throughput"]), *_by_shard(shards)]
    if shards:
        parts.extend(_stages(shards, data["merge_seconds"]))
    if packs:
        chart = histogram(packs["edges"], packs["counts"], "pack fill", "packs", percent=True, height=210)
        caption = "How full the packs are: tokens, by the most that a pack of several sequences holds."
        parts.extend(("<h3>Packs</h3>", figure(chart, caption)))
    return "\n".join((*parts, *_listed(shards)))


def kinds_of(data: dict[str, Any]) -> list[str]:
    """Return the kinds of device and kernel that computed the embeddings, in words."""
    return [kind for kind in str(data["attributes"].get("computed_by", "")).split("; ") if kind]


def _facts(shards: Shards) -> Iterator[tuple[str, str]]:
    if not shards:
        return
    for name in ("precision", "threads", "torch"):
        yield name, ", ".join(dict.fromkeys(str(shard[name]) for shard in shards if shard[name] is not None))
    yield "shards", f"{len(shards):,}"
    tokens = [shard["num_tokens"] or 0 for shard in shards]
    if len(shards) > 1 and sum(tokens):
        yield "balance", f"{max(tokens) * len(tokens) / sum(tokens):.3f}: the most tokens in a shard, by their mean"
    yield "time of computing", f"{duration(sum(s['seconds'].get('compute', 0) for s in shards))}, all shards together"
    late = [shard for shard in shards if (shard["attempt"] or 1) > 1]
    if late:
        resumed = sum(shard["resumed_packs"] or 0 for shard in late)
        yield "retries", f"{many(len(late), 'shard')} at a later attempt, with {many(resumed, 'pack')} of earlier ones"
    for name, what in DETOURS.items():
        if total := sum(shard[name] or 0 for shard in shards):
            yield what, f"{total:,}"


def _by_shard(shards: Shards) -> Iterator[str]:
    if len(shards) < 2:
        return
    yield "<h3>By shard</h3>"
    for name, (title, unit, caption) in BY_SHARD.items():
        values = [shard[name] or 0 for shard in shards]
        if not any(values):
            continue
        if len(shards) <= MAX_BARS:
            rows = [(f"shard {s['rank']}", v, f"{v:,.0f}{unit}") for s, v in zip(shards, values, strict=True)]
            chart = bars(rows, f"{title} by shard")
        else:
            chart = histogram(range(len(shards) + 1), values, "shard (rank)", title, height=200)
        yield figure(chart, caption)
    if all(shard["started"] is not None and shard["ended"] is not None for shard in shards):
        first = min(shard["started"] for shard in shards)
        rows = [(str(s["rank"]), s["started"] - first, s["ended"] - first) for s in shards]
        yield figure(spans(rows, "time since the first shard began"), "When each shard's last attempt ran, by rank.")


def _over_time(throughput: dict[str, Any]) -> Iterator[str]:
    if not throughput:
        return
    title, together, lines = "time since computing began", throughput["all"], throughput["shards"]
    yield "<h3>Speed over time</h3>"
    whole = ("all shards together", together["begin"], together["step"], together["rates"])
    alone = len(lines) == 1
    caption = "Tokens computed per second" + ("." if alone else ", by all shards together.")
    caption += " What earlier attempts computed is not in it." * throughput["later_attempts"]
    yield figure(steps([whole], title, "tokens/s", "area"), caption)
    if alone:
        return
    means = {line["rank"]: sum(line["rates"]) / len(line["rates"]) for line in lines}
    slowest, fastest = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    drawn = [
        (f"shard {line['rank']}: {means[line['rank']]:,.0f} tokens/s", line["begin"], line["step"], line["rates"])
        for line in lines
    ]
    caption = (
        f"By shard, a line each; on average from {means[slowest]:,.0f} tokens/s (shard {slowest}) to "
        f"{means[fastest]:,.0f} (shard {fastest})."
    )
    caption += f" The first {len(lines)} of {throughput['number']:,}." * (throughput["number"] > len(lines))
    yield figure(steps(drawn, title, "tokens/s", "line"), caption)


def _stages(shards: Shards, merge: dict[str, float]) -> Iterator[str]:
    seconds: dict[str, float] = {}
    for shard in shards:
        for name, value in shard["seconds"].items():
            seconds[name] = seconds.get(name, 0) + value
    rows = [(name.replace("_", " "), value, duration(value)) for name, value in seconds.items()]
    rows += [(f"merge: {name}", value, duration(value)) for name, value in merge.items()]
    yield "<h3>Time by stage</h3>"
    caption = "Wall time of each stage, of all shards together; then that of the merge."
    yield figure(bars(rows, "seconds by stage"), caption)


def _listed(shards: Shards) -> Iterator[str]:
    if not shards:
        return
    columns: dict[str, list[str]] = {
        "shard": [f"{shard['rank']}" for shard in shards],
        "sequences": _column(shards, "num_sequences", "{:,}"),
        "tokens": _column(shards, "num_tokens", "{:,}"),
        "pack fill": _column(shards, "pack_fill", "{:.1%}"),
        "compute s": [written(shard["seconds"].get("compute"), "{:,.1f}") for shard in shards],
        "tokens/s": _column(shards, "tokens_per_second", "{:,.0f}"),
        "memory GB": _column(shards, "peak_host_bytes", "{:.1f}", GB),
        "GPU use %": _column(shards, "gpu_utilization_mean", "{:.1f}"),
        "GPU memory GB": _column(shards, "gpu_memory_bytes_max", "{:.1f}", GB),
        "GPU W": _column(shards, "gpu_power_watts_mean", "{:.0f}"),
        "of peak FLOP/s": _column(shards, "model_flop_utilization", "{:.1%}"),
        "attempt": _column(shards, "attempt", "{}"),
        "audit": [str(shard["audit"].get("verdict", "")) for shard in shards],
        "device": [str(shard["device"] or "") for shard in shards],
    }
    if len(set(columns["device"])) == 1:
        del columns["device"]  # it stands above
    columns = {name: cells[:MAX_LISTED] for name, cells in columns.items() if any(cells)}
    what = f"The first {MAX_LISTED} of {len(shards):,} shards" if len(shards) > MAX_LISTED else "All shards"
    is_open = " open" if len(shards) <= MAX_BARS else ""
    rows = zip(*columns.values(), strict=True)
    yield f'<details{is_open}><summary>{what}</summary><div class="wide">{table(list(columns), rows)}</div></details>'


def _column(shards: Shards, name: str, form: str, unit: float = 1) -> list[str]:
    values = [shard[name] for shard in shards]
    return [written(value if value is None or unit == 1 else value / unit, form) for value in values]
