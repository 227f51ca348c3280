"""Prepares what the report's templates show besides the data itself: rows of charts and tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqmill.base.words import duration, percent, written
from seqmill.report.charts import bars, histogram

MAX_BARS = 16  # shards with a bar each; more are drawn as columns
MAX_LISTED = 100  # shards in the table
GB = 1e9
# In the order of the chart.
FATES = ("embedded", "truncated", "windowed", "duplicate", "reused", "rejected", "quarantined")
Shards = Sequence[dict[str, Any]]


def prepare(data: dict[str, Any]) -> dict[str, Any]:
    """Return the variables of the templates that are not in `data`."""
    attributes, shards = data["attributes"], data["shards"]
    return {
        "title": f"{Path(data['fasta']).name or 'embeddings'} by {attributes.get('model', 'an unnamed model')}",
        "kinds": [kind for kind in str(attributes.get("computed_by", "")).split("; ") if kind],
        "fate_rows": _fate_rows(data["fates"]),
        "left_out": _left_out(data["fates"], attributes.get("num_invalid", 0)),
        "speeds": _speeds(data["throughput"]),
        "attempts": _attempts(shards),
        "stages": _stages(shards, data["merge_seconds"]),
        "shard_table": _shard_table(shards),
        "max_bars": MAX_BARS,
        "max_listed": MAX_LISTED,
    }


def _fate_rows(fates: dict[str, int]) -> list[tuple[str, int, str]]:
    total = sum(fates.values())
    counts = [("in windows" if fate == "windowed" else fate, fates.get(fate, 0)) for fate in FATES]
    return [(name, n, f"{n:,} ({percent(n / total)})" if n else "0") for name, n in counts] if total else []


def _left_out(fates: dict[str, int], num_invalid: int) -> list[tuple[str, int, str]]:
    """Return the fates without an embedding, their records, and why."""
    return [
        ("rejected", fates.get("rejected", 0) - num_invalid, "being too long"),
        ("rejected", num_invalid, "having a letter that is not allowed, or no sequence"),
        ("quarantined", fates.get("quarantined", 0), "having no finite embedding"),
    ]


def by_shard(shards: Shards, name: str, title: str, unit: str) -> str:
    """Draw a value of each shard, as SVG; empty if no shard has it."""
    values = [shard[name] or 0 for shard in shards]
    if not any(values):
        return ""
    if len(shards) > MAX_BARS:
        return histogram(range(len(shards) + 1), values, "shard (rank)", title, height=200)
    rows = [(f"shard {s['rank']}", value, f"{value:,.0f}{unit}") for s, value in zip(shards, values, strict=True)]
    return bars(rows, f"{title} by shard")


def _attempts(shards: Shards) -> list[tuple[str, float, float]]:
    """Return when each shard began and ended, in seconds after the first began; [] if any of these is unknown."""
    if any(shard["started"] is None or shard["ended"] is None for shard in shards):
        return []
    first = min((shard["started"] for shard in shards), default=0)
    return [(str(shard["rank"]), shard["started"] - first, shard["ended"] - first) for shard in shards]


def _speeds(throughput: dict[str, Any]) -> dict[str, Any]:
    """Return the lines of the chart of each shard's speed, and the slowest and the fastest shard in words."""
    if not throughput:
        return {}
    lines, means = [], {}
    for line in throughput["shards"]:
        rank, rates = line["rank"], line["rates"]
        means[rank] = sum(rates) / len(rates)
        lines.append((f"shard {rank}: {means[rank]:,.0f} tokens/s", line["begin"], line["step"], rates))
    slow, fast = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    slowest, fastest = f"{means[slow]:,.0f} tokens/s (shard {slow})", f"{means[fast]:,.0f} (shard {fast})"
    return {"lines": lines, "slowest": slowest, "fastest": fastest}


def _stages(shards: Shards, merge: dict[str, float]) -> list[tuple[str, float, str]]:
    names = dict.fromkeys(name for shard in shards for name in shard["seconds"])
    seconds = {name.replace("_", " "): sum(shard["seconds"].get(name, 0) for shard in shards) for name in names}
    seconds |= {f"merge: {name}": value for name, value in merge.items()}
    return [(name, value, duration(value)) for name, value in seconds.items()]


def _shard_table(shards: Shards) -> dict[str, list[Any]]:
    """Return the header and the rows of the table of shards; columns without any value are left out."""

    def column(name: str, form: str, unit: float = 1) -> list[str]:
        return [written(s[name] if s[name] is None or unit == 1 else s[name] / unit, form) for s in shards]

    columns: dict[str, list[str]] = {
        "shard": column("rank", "{}"),
        "sequences": column("num_sequences", "{:,}"),
        "tokens": column("num_tokens", "{:,}"),
        "pack fill": column("pack_fill", "{:.1%}"),
        "compute s": [written(shard["seconds"].get("compute"), "{:,.1f}") for shard in shards],
        "tokens/s": column("tokens_per_second", "{:,.0f}"),
        "memory GB": column("peak_host_bytes", "{:.1f}", GB),
        "GPU use %": column("gpu_utilization_mean", "{:.1f}"),
        "GPU memory GB": column("gpu_memory_bytes_max", "{:.1f}", GB),
        "GPU W": column("gpu_power_watts_mean", "{:.0f}"),
        "of peak FLOP/s": column("model_flop_utilization", "{:.1%}"),
        "attempt": column("attempt", "{}"),
        "audit": [str(shard["audit"].get("verdict", "")) for shard in shards],
        "device": [str(shard["device"] or "") for shard in shards],
    }
    if len(set(columns["device"])) == 1:
        del columns["device"]  # the facts name it already
    columns = {name: cells[:MAX_LISTED] for name, cells in columns.items() if any(cells)}
    return {"header": list(columns), "rows": list(zip(*columns.values(), strict=True))}
