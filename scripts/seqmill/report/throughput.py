"""Speed over time, from the points that the workers have recorded (`seqmill.store.status.Throughput`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_STEPS = 60  # per line
MAX_LINES = 100  # shards; the sum includes all
STAGES_BEFORE = ("import", "load", "resume", "warm_up")  # a worker's stages before it computes


def read_points(points: list[list[float]] | None) -> np.ndarray:
    """Return a status' `throughput` as float64 (n, 2): seconds, tokens; (0, 2) if there is none.

    Raise a ValueError or TypeError if it is not a series of finite, increasing values.
    """
    series = np.array(points if points is not None else [], np.float64).reshape(-1, 2)
    if not np.isfinite(series).all() or (np.diff(series, axis=0) < 0).any():
        raise ValueError("throughput is no series of seconds and tokens")
    return series


def speeds(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return tokens per second over time, for all shards together and for each; {} if no shard has recorded them.

    A line is {begin, step, rates}: rates[k] is the mean from begin + k x step to begin + (k + 1) x step seconds after
    the first shard began to compute. `number` counts the shards with points; the first MAX_LINES have a line each.
    `later_attempts` is true if any shard is at a later attempt. Shards have `rank`, `attempt`, `started` (seconds since
    1970 or None), `seconds` by stage, and `points` from `read_points`.
    """
    found = [
        (shard["rank"], shard["started"] + sum(shard["seconds"].get(stage, 0) for stage in STAGES_BEFORE), points)
        for shard in shards
        if shard["started"] is not None and len(points := shard["points"]) > 1 and points[-1, 0] > 0
    ]
    if not found:
        return {}
    first = min(began for _, began, _ in found)
    series = [(rank, began - first + points[:, 0], points[:, 1]) for rank, began, points in found]
    end = max(seconds[-1] for _, seconds, _ in series)
    edges = np.linspace(0, end, min(MAX_STEPS, sum(len(tokens) - 1 for *_, tokens in series)) + 1)
    total = sum(np.diff(np.interp(edges, seconds, tokens)) for _, seconds, tokens in series)
    lines = []
    for rank, seconds, tokens in series[:MAX_LINES]:
        own = np.linspace(seconds[0], seconds[-1], min(MAX_STEPS, len(tokens) - 1) + 1)
        lines.append({"rank": rank, **_line(own, np.diff(np.interp(own, seconds, tokens)))})
    late = any((shard["attempt"] or 1) > 1 for shard in shards)
    return {"number": len(found), "later_attempts": late, "all": _line(edges, total), "shards": lines}


def _line(edges: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    step = float(edges[1] - edges[0])
    return {"begin": round(float(edges[0]), 2), "step": round(step, 4), "rates": np.round(tokens / step, 1).tolist()}
