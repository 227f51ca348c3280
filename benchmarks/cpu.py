#!/usr/bin/env python3
"""Time whole processes, from FASTA to file, on this machine's CPU: seqmill and other programs.

All contenders use the same seeded weights from disk, the same random proteins with lengths as in UniProt (truncated at
1022 residues) or contigs with lengths as in an assembly, and all cores. They take turns, so that a machine whose speed
drifts is fair to all. Also measures the limits of the processor in the same run.

    python benchmarks/cpu.py

esm.cpp takes part if it is installed: pip install --no-deps esm-cpp. The published code of DNABERT-S takes part if
--published names its folder, see peer_dnabert.py. Writes a Markdown table, and a JSON file to compare with a later run.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from processor_kind import processor_kind
from proteins import random_contigs, random_proteins, write_fasta

BENCHMARKS = Path(__file__).parent
sys.path[:0] = [str(BENCHMARKS.parent / "scripts"), str(BENCHMARKS.parent / "tests/support")]

from checkpoints import save_weights
from machine_limits import instruction_rates, product_rates

from seqmill import open_embeddings
from seqmill.spec.architectures import Architecture, model_flop
from seqmill.spec.families import DNABERT_S, ESM2, ESMC, PROTT5
from seqmill.spec.models import MODELS
from seqmill.store.index import open_index

# Fewer sequences for larger models, so that a round takes minutes.
COUNTS = {
    "esm2_t6_8M_UR50D": 400,
    "esm2_t12_35M_UR50D": 120,
    "esm2_t30_150M_UR50D": 40,
    "esm2_t33_650M_UR50D": 24,
    "esmc_300m": 24,
    "prott5_xl_u50": 24,
    "dnabert_s": 40,
}
T5_LAYERS = 4  # of ProtT5's 24 equal ones: transformers needs 4.8 GB for all in float32, before any activation
PRECISIONS = ("float32", "bfloat16", "int8")
COMPARED = 8  # proteins of which esm.cpp's embeddings are compared: it computes them one by one
SEQMILL = ("seqmill bfloat16", "seqmill float32")
# transformers' name in the table, dtype, and way to make batches; see peer_transformers_families.py.
WAYS = {
    "transformers float32": ("float32", "sorted"),
    "transformers bfloat16": ("bfloat16", "sorted"),
    "transformers float32, not sorted": ("float32", "order"),
    "transformers float32, one by one": ("float32", "single"),
    "transformers bfloat16, one by one": ("bfloat16", "single"),
}
# In float32: the others' errors are differences from it.
EXACT = {
    ESM2: "fair-esm",
    ESMC: "transformers float32, one by one",
    PROTT5: "transformers float32, one by one",
    DNABERT_S: "published code",
}
CONTENDERS = (*SEQMILL, "fair-esm", *WAYS, "esm.cpp float32", "esm.cpp int8", "published code")
# In a small process, because Linux counts the memory of the process that starts another as the other's.
LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(["bash", "-c", sys.argv[1]])
_, status, usage = os.wait4(child.pid, 0)
seconds, used = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
print(json.dumps({"seconds": round(seconds, 2), "cpu_seconds": round(used, 2), "peak_bytes": usage.ru_maxrss * 1024}))
sys.exit(status != 0)
"""


@dataclass(frozen=True)
class Contender:
    """A program, and how to run it."""

    name: str
    command: str  # for bash, in the folder of the weights
    output: str  # the file with its embeddings
    prepare: str = ""  # a command that runs once before, not timed
    compare: str = ""  # a command that makes the output, if the timed one does not


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(COUNTS), default=tuple(COUNTS), help="models to time")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contender (default: 2)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="who takes part")
    parser.add_argument("--published", type=Path, help="folder with the published code of DNABERT-S")
    slug, kind = processor_kind()
    output = BENCHMARKS / "results" / f"cpu-{slug}"
    parser.add_argument("--output", type=Path, default=output, help=f"writes OUTPUT.md and OUTPUT.json ({output})")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rates = instruction_rates(Path(folder))
    results = {
        "date": date.today().isoformat(),
        "processor": kind,
        "cores": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "instructions": rates,
        "models": {},
    }
    for model in arguments.models:
        found = [one for one in contenders(model, arguments.published) if one.name in arguments.contenders]
        results["models"][model] = measure(model, found, arguments.rounds)
        arguments.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(table(results))
    print(table(results))


def contenders(model: str, published: Path | None) -> list[Contender]:
    """Return the contenders for a model that are installed."""
    python, scripts, peers, weights = sys.executable, BENCHMARKS.parent / "scripts", BENCHMARKS, weights_of(model)
    found = []
    for name in SEQMILL:
        precision = name.split()[1]
        steps = [
            index_command(model),
            f"{python} {scripts}/embed_shard.py --index index.h5 --rank 0 --world-size 1 --device cpu --audit-seconds 0"
            f" --precision {precision} --output s.h5 --status s.status.json",
            f"{python} {scripts}/merge_shards.py --index index.h5 --shards s.h5 --output {precision}.h5",
        ]
        found.append(Contender(name, " && ".join(steps), f"{precision}.h5"))
    family = MODELS[model].family
    if family in (ESMC, PROTT5):
        peer = f"{python} {peers}/peer_transformers_families.py input.fa {weights} {family.max_length}"
        for number, (name, (dtype, way)) in enumerate(WAYS.items()):
            found.append(Contender(name, f"{peer} {dtype} {way} peer{number}.npy", f"peer{number}.npy"))
        return found
    if family == DNABERT_S:
        if published:
            command = f"{python} {peers}/peer_dnabert.py {published.resolve()} input.fa {weights} exact.npy"
            found.append(Contender("published code", command, "exact.npy"))
        return found
    found.append(Contender("fair-esm", f"{python} {peers}/peer_fair_esm.py input.fa {weights} exact.pt", "exact.pt"))
    for dtype in ("float32", "bfloat16"):
        command = f"{python} {peers}/peer_transformers.py input.fa hugging_face {dtype} {dtype}.npy"
        found.append(Contender(f"transformers {dtype}", command, f"{dtype}.npy"))
    if importlib.util.find_spec("esm_cpp") is None:
        print("esm.cpp takes no part: pip install --no-deps esm-cpp", file=sys.stderr)
        return found
    peer = f"{python} {peers}/peer_esm_cpp.py"
    exact, small = f"{peer} input.fa esm_cpp.safetensors", f"ESM_AMX_ATTENTION=on {peer} input.fa esm_cpp.gguf"
    quantize = f"{peer} quantize esm_cpp.safetensors esm_cpp.gguf"
    found.append(Contender("esm.cpp float32", exact, "cpp32.npy", compare=f"{exact} {COMPARED} cpp32.npy"))
    found.append(Contender("esm.cpp int8", small, "cpp8.npy", quantize, f"{small} {COMPARED} cpp8.npy"))
    return found


def weights_of(model: str) -> str:
    """Return the name of the weights that `save_weights` saves for seqmill."""
    return {DNABERT_S: "dnabert", ESM2: f"{model}.pt"}.get(MODELS[model].family, "hugging_face")


def architecture_of(model: str) -> Architecture:
    """Return a model's sizes, with `T5_LAYERS` layers for a T5."""
    architecture = MODELS[model]
    return replace(architecture, num_layers=T5_LAYERS) if architecture.family == PROTT5 else architecture


def index_command(model: str) -> str:
    program = BENCHMARKS.parent / "scripts/build_index.py"
    return f"{sys.executable} {program} --fasta input.fa --model {weights_of(model)} --output index.h5"


def measure(model: str, found: list[Contender], rounds: int) -> dict:
    """Return tokens, FLOP, limits, errors, and seconds and peak memory of every run."""
    architecture = architecture_of(model)
    make = random_proteins if architecture.family.is_protein else random_contigs
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_fasta(folder / "input.fa", make(COUNTS[model]))
        save_weights(model, architecture, folder)
        timed(index_command(model), folder)
        index = open_index(folder / "index.h5")
        lengths = np.concatenate([index.pack_lengths(pack) for pack in range(index.num_packs)])
        for one in found:
            if one.prepare:
                timed(one.prepare, folder)
        limits: dict[str, list[float]] = {}
        runs: dict[str, list[dict[str, float]]] = {one.name: [] for one in found}
        for number in range(rounds):
            for name, rate in product_rates(architecture.hidden_dim, architecture.ffn_dim).items():
                limits.setdefault(name, []).append(rate)
            for one in found:
                runs[one.name].append(timed(one.command, folder))
                print(f"{model} round {number + 1}: {one.name}: {runs[one.name][-1]}", file=sys.stderr)
        for one in found:
            if one.compare:
                timed(one.compare, folder)
        return {
            "sequences": COUNTS[model],
            "layers": architecture.num_layers,
            "tokens": int(lengths.sum()),
            "flop": model_flop(architecture, lengths),
            "limits": {name: statistics.median(rates) for name, rates in limits.items()},
            "errors": errors(found, EXACT[architecture.family], folder),
            "runs": runs,
        }


def errors(found: list[Contender], exact: str, folder: Path) -> dict[str, float]:
    """Return each contender's worst relative L2 error of an embedding against `exact`, which is one of them."""
    outputs = {one.name: embeddings(folder / one.output) for one in found}
    if exact not in outputs:
        return {}
    reference = outputs.pop(exact)
    worst = {}
    for name, rows in outputs.items():
        expected = reference[: len(rows)]
        worst[name] = float((np.linalg.norm(rows - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())
    return worst


def embeddings(path: Path) -> np.ndarray:
    """Read a contender's embeddings in the order of the FASTA, float32 (sequences, hidden_dim)."""
    if path.suffix == ".pt":
        rows = torch.load(path)
        return np.stack([rows[f"p{number}"].numpy() for number in range(len(rows))])
    return np.load(path) if path.suffix == ".npy" else open_embeddings(path).array[:]


def timed(command: str, folder: Path) -> dict[str, float]:
    """Run a command in bash; return wall and processor seconds, and its largest process's peak memory in bytes."""
    launcher = [sys.executable, "-c", LAUNCHER, command]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(
        launcher, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    if done.returncode:
        raise SystemExit(f"failed: {command}")
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict) -> str:
    """Return the results in Markdown: medians over the rounds."""
    lines = [
        f"{results['processor']}, {results['cores']} cores, torch {results['torch']}, {results['date']}.",
        "Whole processes, FASTA to file; real tokens; medians of the rounds, which took turns. The error is the worst",
        "relative L2 error of an embedding against fair-esm in float32; for DNABERT-S, against its published code; for",
        "ESM C and ProtT5, against transformers in float32, one by one. The peak is that of the bfloat16 matrix",
        f"product below. The error of esm.cpp is that of its first {COMPARED} proteins. ProtT5 has {T5_LAYERS} layers.",
        "Processor time is that of all threads; other work on the machine changes it less than the seconds.",
        "",
        "| model | contender | seconds | tokens/s | seqmill bfloat16 is | in processor time "
        "| peak memory | worst error | of peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, measured in results["models"].items():
        medians = {name: statistics.median(run["seconds"] for run in runs) for name, runs in measured["runs"].items()}
        used = {name: statistics.median(run["cpu_seconds"] for run in runs) for name, runs in measured["runs"].items()}
        for name, seconds in medians.items():
            peak = max(run["peak_bytes"] for run in measured["runs"][name])
            share = measured["flop"] / seconds / measured["limits"]["bfloat16"]
            ratio = f"{seconds / medians[SEQMILL[0]]:.1f}x" if SEQMILL[0] in medians else ""
            cpu_ratio = f"{used[name] / used[SEQMILL[0]]:.1f}x" if SEQMILL[0] in used else ""
            error = f"{measured['errors'][name]:.1e}" if name in measured["errors"] else ""
            lines.append(
                f"| {model} | {name} | {seconds:.1f} | {measured['tokens'] / seconds:,.0f} | {ratio} "
                f"| {cpu_ratio} | {peak / 1e9:.2f} GB | {error} | {share:.0%} |"
            )
    lines += ["", "GFLOP/s of the largest matrix product, on all cores:", "", "| model | float32 | bfloat16 | int8 |"]
    lines.append("|---|---|---|---|")
    for model, measured in results["models"].items():
        rates = (f"{measured['limits'][name] / 1e9:,.0f}" if name in measured["limits"] else "" for name in PRECISIONS)
        lines.append(f"| {model} | {' | '.join(rates)} |")
    instructions = [f"{name} {rate / 1e9:,.0f}" for name, rate in results["instructions"].items()]
    return "\n".join(lines) + f"\n\nGFLOP/s of one core's instructions, without memory: {', '.join(instructions)}.\n"


if __name__ == "__main__":
    main()
