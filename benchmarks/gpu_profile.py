"""The kernels of one layer by time, and the share of the time in which the GPU runs none, from torch.profiler."""

from collections import Counter

import torch
from gpu_models import Measured, Way
from torch.profiler import DeviceType, ProfilerActivity, profile

SHOWN = 20
PROFILED_PACKS = 6


def profile_layers(measured: Measured, way: Way) -> dict:
    """Return the kernels of packs that the runner computes, each with its time and launches per layer and pack.

    On a rehearsal without a GPU these are PyTorch's operations on the CPU, as `on` says.
    """
    model = measured.make(way)
    packs = measured.packs.evenly(PROFILED_PACKS)
    measured.embeddings(model, packs)  # kernels are loaded and compiled
    activities = {ProfilerActivity.CPU, ProfilerActivity.CUDA} & torch.profiler.supported_activities()
    with profile(activities=activities) as profiler:
        measured.embeddings(model, packs)
        torch.cuda.synchronize(measured.device)
    events = list(profiler.events())
    on_device = [event for event in events if event.device_type == DeviceType.CUDA and event.time_range.elapsed_us()]
    kernels = on_device or [event for event in events if not event.cpu_children]
    seconds, launches = Counter(), Counter()
    for event in kernels:
        seconds[event.name] += event.time_range.elapsed_us() / 1e6
        launches[event.name] += 1
    per_layer = len(packs) * measured.architecture.num_layers
    total = sum(seconds.values())
    return {
        "model": measured.name,
        "way": str(way),
        "on": "GPU" if on_device else "CPU",
        "packs": len(packs),
        "host_share": idle_share([(event.time_range.start, event.time_range.end) for event in kernels]),
        "launches_per_layer": sum(launches.values()) / per_layer,
        "kernels": [
            {
                "name": name[:120],
                "share": spent / total,
                "us_per_layer": spent / per_layer * 1e6,
                "launches_per_layer": launches[name] / per_layer,
            }
            for name, spent in seconds.most_common(SHOWN)
        ],
    }


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Return the share of the time from the first start to the last end in which no span runs."""
    busy, reached = 0.0, spans[0][0] if spans else 0.0
    for start, end in sorted(spans):
        busy += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    whole = reached - min((start for start, _ in spans), default=0.0)
    return 1 - busy / whole if whole else 0.0
