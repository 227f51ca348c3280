#!/usr/bin/env python3
"""Measure seqmill on this machine's GPU, and transformers and fair-esm if they are installed.

For each model: tokens/s of every attention kernel that works here, with elementwise steps fused and eager, in
bfloat16 and float16; the share of the GEMM peak; GPU utilization; host time per pack; memory; the worst cosine to
float32. Then one run from FASTA to HDF5, then the peers. The weights are seeded, and the proteins have lengths as in
UniProt. Each result is written at once, so a killed run loses none. Steps that would begin after the time limit are
skipped and listed.

    python benchmarks/gpu.py --output benchmarks/results/gpu
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
from gpu_table import table
from proteins import random_proteins, write_fasta

BENCHMARKS = Path(__file__).parent
sys.path[:0] = [str(BENCHMARKS.parent / "scripts"), str(BENCHMARKS.parent / "tests/support")]

from seqmill.embedding.embedder import PackEmbedder
from seqmill.embedding.monitor import gemm_peak, gpu_use, monitor
from seqmill.embedding.pooling import mean_over_residues
from seqmill.embedding.readout import Readout
from seqmill.embedding.runner import embed_packs
from seqmill.embedding.worker import embed_shard
from seqmill.errors import SeqmillError
from seqmill.index.build import build_index
from seqmill.model.attention import FASTEST_FIRST, choose_kernel, why_not
from seqmill.model.elementwise import EAGER, choose_elementwise
from seqmill.model.esm2 import ESM2
from seqmill.model.kernels import fused
from seqmill.model.pack import Pack
from seqmill.model.weights import untrained_tensors
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import MODELS, Architecture, model_flop
from seqmill.spec.outputs import Outputs
from seqmill.spec.task import ComputeSettings, ShardTask
from seqmill.store.index import Index, open_index

SIZES = [name for name in MODELS if "15B" not in name]
FLAGSHIP = "esm2_t33_650M_UR50D"  # for the run from FASTA to HDF5 and the comparison with the peers
PROTEINS = 60000
PEER_PROTEINS = 500
ROUND_SECONDS = 3.0  # a round has as many packs as the first variant computes in this time
FILE_SECONDS = 15.0  # likewise the number of proteins in the run from FASTA to HDF5
MAX_LENGTH = 1022


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=SIZES, help="models to measure")
    parser.add_argument("--rounds", type=int, default=2, help="timed runs of each variant (default: 2)")
    parser.add_argument("--minutes", type=float, default=7.0, help="start no step after this time (default: 7)")
    parser.add_argument("--output", type=Path, required=True, help="writes OUTPUT.md and OUTPUT.json")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    results = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "gemm_flops": {kind: gemm_peak(device, getattr(torch, kind)) for kind in ("bfloat16", "float16", "float32")},
        "triton": fused.available(device),
        "models": {},
        "left_out": [],
    }
    end = time.monotonic() + 60 * arguments.minutes

    def step(name: str, work: Callable[[], object]) -> None:
        """Run a step if there is time left, and save the results so far; record a failure and continue."""
        if time.monotonic() > end:
            results["left_out"].append(f"{name}: no time left")
        else:
            try:
                work()
            except (RuntimeError, OSError, subprocess.SubprocessError, SeqmillError) as error:
                message = (str(error) or type(error).__name__).splitlines()[0]
                results["left_out"].append(f"{name}: {message}")
        save(results, arguments.output)
        print(f"{name}: done, {end - time.monotonic():.0f} s left", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        proteins = random_proteins(PROTEINS)
        index = make_index(folder, proteins)
        for name in arguments.models:
            step(name, lambda n=name: measure(n, index, device, arguments.rounds, results, step))
            torch.cuda.empty_cache()
        rate = best_rate(results, FLAGSHIP)
        step("FASTA to HDF5", lambda: results.update(file=whole_run(folder, proteins, rate or 1e4)))
        measure_peers(folder, proteins[:PEER_PROTEINS], device, results, step, lambda: end - time.monotonic())
    print(table(results))


def save(results: dict, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    output.with_suffix(".md").write_text(table(results))


def make_index(folder: Path, sequences: list[str]) -> Index:
    write_fasta(folder / "proteins.faa", sequences)
    build_index(folder / "proteins.faa", folder / f"{len(sequences)}.h5", f"untrained:{FLAGSHIP}", LengthPolicy())
    return open_index(folder / f"{len(sequences)}.h5")


def ways(architecture: Architecture, device: torch.device) -> list[tuple[str, str, str]]:
    """Return the variants (precision, attention kernel, elementwise kernel), the default first."""
    head_dim = architecture.head_dim
    elementwise = choose_elementwise(device, torch.bfloat16, (architecture.hidden_dim, architecture.ffn_dim))
    best = choose_kernel(device, torch.bfloat16, head_dim)
    others = [name for name in FASTEST_FIRST if name != best and not why_not(name, device, torch.bfloat16, head_dim)]
    found = [("bfloat16", best, elementwise), ("float16", choose_kernel(device, torch.float16, head_dim), elementwise)]
    if elementwise != EAGER:
        found.append(("bfloat16", best, EAGER))
    return found + [("bfloat16", name, elementwise) for name in others]


def measure(name: str, index: Index, device: torch.device, rounds: int, results: dict, step: Callable) -> None:
    """Measure every variant of a model; the first decides how many packs a round has."""
    architecture = MODELS[name]
    measured = results["models"][name] = {"ways": []}
    # On the device, so that models of any dtype are made from them quickly; not counted as used memory.
    tensors = {key: tensor.to(device) for key, tensor in untrained_tensors(architecture).items()}
    held = sum(tensor.nbytes for tensor in tensors.values())
    checked = [index.num_packs // 2, index.num_packs - 1]
    exact: list[np.ndarray] = []
    packs: list[int] = []

    def reference() -> None:
        model = ESM2(architecture, tensors, torch.float32, index.max_tokens).to(device)
        exact.append(embeddings(model, index, checked, device))

    def way(precision: str, kernel: str, elementwise: str) -> None:
        dtype = getattr(torch, precision)
        model = ESM2(architecture, tensors, dtype, index.max_tokens, kernel, elementwise).to(device)
        cosine = worst_cosine(embeddings(model, index, checked, device), exact[0]) if exact else None
        if not packs:
            rate = 1 / timed(model, index, checked[:1] * 4, device)
            packs.extend(evenly(index.num_packs, round(rate * 4 * ROUND_SECONDS)))
            lengths = np.concatenate([index.pack_lengths(pack) for pack in packs])
            measured.update(tokens=int(lengths.sum()), flop=model_flop(architecture, lengths), packs=len(packs))
        torch.cuda.reset_peak_memory_stats(device)
        with monitor(device, seconds=0.1) as samples:
            seconds = [timed(model, index, packs, device) for _ in range(rounds)]
        measured["ways"].append(
            {
                "precision": precision,
                "attention": kernel,
                "elementwise": elementwise,
                "seconds": seconds,
                "peak_bytes": torch.cuda.max_memory_allocated(device) - held,
                "worst_cosine_to_float32": cosine,
                **dict(zip(("host_seconds", "device_seconds"), pack_seconds(model, index, packs, device), strict=True)),
                **gpu_use(samples),
            }
        )

    step(f"{name} float32 reference", reference)
    for precision, kernel, elementwise in ways(architecture, device):
        step(f"{name} {precision} {kernel} {elementwise}", lambda w=(precision, kernel, elementwise): way(*w))


def embedder(model: ESM2) -> PackEmbedder:
    return PackEmbedder(model, Readout("esm2", Outputs((len(model.layers),))), lambda: model)


def embeddings(model: ESM2, index: Index, packs: list[int], device: torch.device) -> np.ndarray:
    computed = embed_packs(embedder(model), index, packs, device, threads=1)
    return np.concatenate([means for _, means, _ in computed])


def timed(model: ESM2, index: Index, packs: list[int], device: torch.device) -> float:
    """Return the seconds from the index's tokens to embeddings on the host."""
    start = time.perf_counter()
    for _ in embed_packs(embedder(model), index, packs, device, threads=1):
        pass
    return time.perf_counter() - start


def evenly(num_packs: int, count: int) -> list[int]:
    """Return pack numbers spread evenly, so that lengths are distributed as in the whole."""
    return np.unique(np.linspace(0, num_packs - 1, min(max(count, 4), num_packs)).astype(int)).tolist()


def pack_seconds(model: ESM2, index: Index, packs: list[int], device: torch.device) -> tuple[float, float]:
    """Return medians over packs: the host's seconds to queue a pack, and the device's seconds to compute it."""
    host, on_device = [], []
    for number in evenly(len(packs), 8):
        pack = Pack.from_tokens(index.pack_tokens(packs[number]), index.pack_lengths(packs[number]))
        pack = Pack(pack.tokens.to(device), pack.cu_seqlens.to(device), pack.lengths)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        first.record()
        mean_over_residues(model(pack), pack)
        last.record()
        host.append(time.perf_counter() - start)
        last.synchronize()
        on_device.append(first.elapsed_time(last) / 1e3)
    return statistics.median(host), statistics.median(on_device)


def worst_cosine(found: np.ndarray, expected: np.ndarray) -> float:
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    return float(cosines.min())


def best_rate(results: dict, name: str) -> float:
    """Return the tokens/s of a model's first variant; 0 if it was not measured."""
    measured = results["models"].get(name, {"ways": []})
    return measured["tokens"] / min(measured["ways"][0]["seconds"]) if measured["ways"] else 0.0


def whole_run(folder: Path, proteins: list[str], rate: float) -> dict:
    """Make a shard from a FASTA file, as the workflow does, in bfloat16."""
    count = min(int(rate * FILE_SECONDS / 350), len(proteins))
    write_fasta(folder / "whole.faa", proteins[:count])
    start = time.perf_counter()
    build_index(folder / "whole.faa", folder / "whole.h5", f"untrained:{FLAGSHIP}", LengthPolicy())
    indexed = time.perf_counter()
    shard, status = folder / "shard_0-of-1.h5", folder / "shard_0-of-1.status.json"
    done = embed_shard(ShardTask(folder / "whole.h5", 0, 1, shard, status, ComputeSettings("cuda", "bfloat16")))
    return {
        "model": FLAGSHIP,
        "sequences": count,
        "tokens": done.run.num_tokens,
        "seconds": time.perf_counter() - start,
        "stages": {"index": round(indexed - start, 3), **done.seconds},
        "tokens_per_second_computing": done.run.tokens_per_second,
    }


def measure_peers(
    folder: Path, proteins: list[str], device: torch.device, results: dict, step: Callable, left: Callable[[], float]
) -> None:
    """Time the embedding of the same proteins, without loading, by seqmill and by each peer in its own process."""
    peers = results["peers"] = {"model": FLAGSHIP, "sequences": len(proteins), "seconds": {}}
    peers["tokens"] = sum(min(len(protein), MAX_LENGTH) + 2 for protein in proteins)
    if missing := [name for name in ("esm", "transformers", "Bio") if importlib.util.find_spec(name) is None]:
        results["left_out"].append(f"peers: not installed: {', '.join(missing)}")
        return
    from cpu import save_weights

    def ours() -> None:
        index, architecture = make_index(folder, proteins), MODELS[FLAGSHIP]
        precision, kernel, elementwise = ways(architecture, device)[0]
        weights = untrained_tensors(architecture)
        model = ESM2(architecture, weights, getattr(torch, precision), index.max_tokens, kernel, elementwise).to(device)
        timed(model, index, [0], device)
        peers["seconds"][f"seqmill {precision}"] = timed(model, index, list(range(index.num_packs)), device)

    def peer(name: str, *command: str) -> None:
        script = [sys.executable, str(BENCHMARKS / command[0]), "proteins.faa", *command[1:]]
        run = subprocess.run(
            script, cwd=folder, capture_output=True, text=True, check=True, timeout=max(left(), 0) + 60
        )
        peers["seconds"][name] = float(run.stderr.splitlines()[-1])

    step("peers: seqmill", ours)
    step("peers: weights", lambda: save_weights(FLAGSHIP, folder))
    transformers, fair_esm = "peer_transformers.py", ("peer_fair_esm.py", f"{FLAGSHIP}.pt", "means.pt", "cuda")
    for name, *command in (
        ("transformers bfloat16", transformers, "hugging_face", "bfloat16", "means.npy", "cuda"),
        ("fair-esm float16", *fair_esm, "float16"),
        ("fair-esm float32", *fair_esm, "float32"),
    ):
        step(f"peers: {name}", lambda n=name, c=tuple(command): peer(n, *c))


if __name__ == "__main__":
    main()
