#!/usr/bin/env python3
"""Measure seqmill on this machine's GPU, and transformers and fair-esm if they are installed.

For ESM-2 650M, 3B, and 8M, and DNABERT-S: tokens/s of every precision and every switch, the share of the GEMM peak, the
host's share, memory, and the worst cosine to float32; the peers with the same weights and tokens; runs from FASTA to
HDF5; the kernels of a layer by time. Weights are seeded, and sequences have lengths as in UniProt or an assembly. Each
result is written at once; a step that fails, hangs, or crashes is recorded; a call with an output that exists goes on
where the one before stopped. docs/how-to/gpu.md says what each figure means.

    python benchmarks/gpu.py --output benchmarks/results/gpu
"""

import argparse
import functools
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from importlib.util import find_spec
from pathlib import Path

BENCHMARKS = Path(__file__).parent
sys.path[:0] = [str(BENCHMARKS.parent / "scripts")]

from gpu_steps import CHILD, Record, Step, run_steps, supervise
from gpu_table import short_table, write_table

PACKAGES = ("torch", "triton", "numpy", "h5py", "msgspec", "tokenizers", "safetensors", "transformers", "fair-esm")
FILE_NEEDS = ("h5py", "msgspec")
VARIANT_SECONDS, PEER_SECONDS, FILE_SECONDS, PROFILE_SECONDS = 9.0, 15.0, 50.0, 12.0  # guesses, not measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=560.0, help="end after this time (default: 560)")
    parser.add_argument("--output", type=Path, required=True, help="writes OUTPUT.md and OUTPUT.json")
    arguments = parser.parse_args()
    path = arguments.output.with_suffix(".json")
    if CHILD in os.environ:
        sys.exit(measure_all(Record(path, write_table)))
    supervise(path, arguments.seconds, [sys.executable, *sys.argv])
    print(short_table(Record(path, write_table).results))


def measure_all(record: Record) -> int:
    """Run the steps that are left; return the exit status."""
    import torch
    from gpu_models import reset_peak

    device = torch.device("cuda")
    require_same_machine(record, torch.cuda.get_device_name(device))
    with tempfile.TemporaryDirectory() as folder:
        return run_steps(record, list(steps(record, device, Path(folder))), lambda: reset_peak(device))


def require_same_machine(record: Record, name: str) -> None:
    """End with a message if the results so far are of another kind of GPU."""
    before = record.results.setdefault("device", name)
    if before != name:
        sys.exit(f"{record.path}: has results of {before}, and this machine has {name}; give another --output")


def steps(record: Record, device: object, folder: Path) -> Iterator[Step]:
    """Yield the steps, the most important ones first."""
    from gpu_files import file_run
    from gpu_models import Measured, measure
    from gpu_peers import MODULES, PEERS, measure_peer
    from gpu_profile import profile_layers
    from gpu_sizes import DNABERT, SIZES

    @functools.lru_cache(1)  # the weights of one model at a time
    def model(name: str) -> Measured:
        return Measured(name, device)

    def variant(name: str, way: object) -> Step:
        return Step(f"{name}: {way}", lambda: {"kind": "variant", **measure(model(name), way)}, VARIANT_SECONDS)

    def file(name: str) -> Step:
        needs = (*FILE_NEEDS, *(("tokenizers",) if name == DNABERT else ()))
        work = functools.partial(file_run, folder, name)
        step = f"{name}: FASTA to HDF5"
        return Step(step, lambda: {"kind": "file", **work(rate_of(record, name))}, FILE_SECONDS, needs)

    yield Step("machine", lambda: {"kind": "machine", **machine(device)}, 5.0)
    flagship, ways = next(iter(SIZES.models)), {}
    for name in SIZES.models:
        try:
            ways[name] = Measured(name, device).ways()
        except Exception as error:
            yield Step(f"{name}: variants", functools.partial(fail, error), 0.0)
            continue
        yield variant(name, ways[name][0])
        if name == flagship:
            yield from map(file, SIZES.files[:1])
        if name != DNABERT:
            for peer, precision in PEERS if name == flagship else PEERS[:2]:
                work = functools.partial(peer_figures, model, name, peer, precision, measure_peer)
                yield Step(f"{name}: {peer} {precision}", work, PEER_SECONDS, MODULES[peer])
        if name in (flagship, DNABERT):
            work = functools.partial(profile_figures, model, name, ways[name][0], profile_layers)
            yield Step(f"{name}: profile", work, PROFILE_SECONDS)
        for way in ways[name][1:]:
            yield variant(name, way)
    yield from map(file, SIZES.files[1:])


def fail(error: Exception) -> dict:
    raise error


def peer_figures(model: object, name: str, peer: str, precision: str, measure: object) -> dict:
    return {"kind": "peer", **measure(model(name), peer, precision)}


def profile_figures(model: object, name: str, way: object, profile: object) -> dict:
    return {"kind": "profile", **profile(model(name), way)}


def rate_of(record: Record, name: str) -> float | None:
    """Return the tokens/s of a model's fastest variant in bfloat16; None if there is none yet."""
    results = (step.get("result", {}) for step in record.steps.values() if step["state"] == "done")
    rates = [
        result["tokens_per_second"]
        for result in results
        if result.get("kind") == "variant" and result["model"] == name and result["precision"] == "bfloat16"
    ]
    return max(rates, default=None)


def machine(device: object) -> dict:
    """Return what the figures depend on, which packages are missing, and the speed of large matrix products."""
    import torch

    from seqmill.embedding.device import dtype_of
    from seqmill.embedding.monitor import gemm_peak
    from seqmill.model.kernels import fused

    has_float8 = torch.cuda.get_device_capability(device) >= (8, 9)
    kinds = ["bfloat16", "float16", "float32", *(["float8"] if has_float8 else [])]
    peaks = {}
    for kind in kinds:
        try:
            peaks[kind] = gemm_peak(device, dtype_of(kind))
        except RuntimeError as error:
            print(f"no peak in {kind}: {error}", file=sys.stderr)
    properties = torch.cuda.get_device_properties(device)
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "esm" if name == "fair-esm" and find_spec("esm") else "missing"
    return {
        "date": date.today().isoformat(),
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": torch.cuda.get_device_capability(device),
        "cuda": torch.version.cuda,
        "packages": versions,
        "cores": len(os.sched_getaffinity(0)),
        "triton_kernels": fused.available(device),
        "gemm_flops": peaks,
    }


if __name__ == "__main__":
    main()
