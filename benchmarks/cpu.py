#!/usr/bin/env python3
"""Time whole processes, from FASTA to file, on this machine's CPU: seqmill, fair-esm, transformers.

All contenders use the same seeded weights from disk, the same proteins with lengths as in UniProt, truncated at 1022
residues, and all cores. They take turns, so a machine whose speed drifts is fair to all. Writes a Markdown table and a
JSON file for comparison with a later run.

    python benchmarks/cpu.py --output benchmarks/results/cpu
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from proteins import random_proteins, write_fasta

BENCHMARKS = Path(__file__).parent
sys.path[:0] = [str(BENCHMARKS.parent / "scripts"), str(BENCHMARKS.parent / "tests/support")]

from reference import fair_esm_model, save_checkpoint
from seqmill.base.machine import processor
from seqmill.spec.models import MODELS, Architecture, model_flop

MAX_LENGTH = 1022
# Fewer proteins for the larger models, so that a round takes minutes.
COUNTS = {"esm2_t6_8M_UR50D": 500, "esm2_t12_35M_UR50D": 250, "esm2_t30_150M_UR50D": 80}
CONTENDERS = ("seqmill", "fair-esm", "transformers float32", "transformers bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(COUNTS), default=tuple(COUNTS), help="models to time")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contender (default: 2)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="who takes part")
    parser.add_argument("--output", type=Path, required=True, help="writes OUTPUT.md and OUTPUT.json")
    arguments = parser.parse_args()
    results = {
        "date": date.today().isoformat(),
        "processor": processor()[0],
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "models": {},
    }
    for model in arguments.models:
        results["models"][model] = measure(model, arguments.contenders, arguments.rounds)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(table(results))
    print(table(results))


def measure(model: str, contenders: tuple[str, ...], rounds: int) -> dict:
    """Return tokens, FLOP, the GEMM roofline, and seconds and peak memory of every run."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sequences = random_proteins(COUNTS[model])
        write_fasta(folder / "proteins.faa", sequences)
        lengths = np.array([min(len(sequence), MAX_LENGTH) + 2 for sequence in sequences])
        save_weights(model, folder)
        runs: dict[str, list[dict[str, float]]] = {contender: [] for contender in contenders}
        rooflines = []
        for number in range(rounds):
            rooflines.append(gemm_roofline(MODELS[model]))
            for contender in contenders:
                run = timed(command_of(contender, model, folder))
                runs[contender].append(run)
                print(f"{model} round {number + 1}: {contender}: {run['seconds']:.1f} s", file=sys.stderr)
    return {
        "sequences": len(sequences),
        "tokens": int(lengths.sum()),
        "flop": model_flop(MODELS[model], lengths),
        "roofline_bfloat16_flops": statistics.median(rooflines),
        "runs": runs,
    }


def save_weights(model: str, folder: Path) -> None:
    """Save the same seeded weights as a fair-esm checkpoint and as a Hugging Face folder."""
    from transformers import EsmConfig, EsmForMaskedLM

    from seqmill.model.esm2 import parameter_shapes
    from seqmill.model.esm2_weights import FAIR_ESM, HUGGING_FACE

    architecture = MODELS[model]
    reference = fair_esm_model(architecture)
    save_checkpoint(reference, folder / f"{model}.pt")
    config = EsmConfig(
        vocab_size=33,
        hidden_size=architecture.hidden_dim,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
        intermediate_size=architecture.ffn_dim,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
        layer_norm_eps=1e-5,
        pad_token_id=1,
        mask_token_id=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    target = EsmForMaskedLM(config)
    state, source = target.state_dict(), reference.state_dict()
    for parameter in parameter_shapes(architecture):
        for one, other in zip(FAIR_ESM.names_of(parameter), HUGGING_FACE.names_of(parameter), strict=True):
            state[f"esm.{other}"].copy_(source[one])
    target.load_state_dict(state)
    target.save_pretrained(folder / "hugging_face")


def command_of(contender: str, model: str, folder: Path) -> list[str]:
    """Return a contender's shell command, from the FASTA to its file."""
    python, scripts = sys.executable, BENCHMARKS.parent / "scripts"
    if contender == "seqmill":
        steps = [
            f"{python} {scripts}/build_index.py --fasta proteins.faa --model {model}.pt --output index.h5",
            f"{python} {scripts}/embed_shard.py --index index.h5 --rank 0 --world-size 1 --device cpu --audit-seconds 0"
            " --output s.h5 --status s.status.json",
            f"{python} {scripts}/merge_shards.py --index index.h5 --shards s.h5 --output embeddings.h5",
        ]
    elif contender == "fair-esm":
        steps = [f"{python} {BENCHMARKS}/peer_fair_esm.py proteins.faa {model}.pt embeddings.pt"]
    else:
        dtype = contender.split()[1]
        steps = [f"{python} {BENCHMARKS}/peer_transformers.py proteins.faa hugging_face {dtype} embeddings.npy"]
    return ["bash", "-c", f"cd {folder} && " + " && ".join(steps)]


def timed(command: list[str]) -> dict[str, float]:
    """Run a command; return wall seconds and the peak memory of its largest process, in bytes."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"failed: {command[-1]}")
    return {"seconds": round(seconds, 2), "peak_bytes": usage.ru_maxrss * 1024}


def gemm_roofline(architecture: Architecture) -> float:
    """Return FLOP/s of this model's largest bfloat16 matrix product, on all cores at once."""
    torch.set_num_threads(os.cpu_count() or 1)
    x = torch.randn(4096, architecture.hidden_dim).bfloat16()
    weight = torch.randn(architecture.ffn_dim, architecture.hidden_dim).bfloat16()
    best = 0.0
    for _ in range(20):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = max(best, 2 * x.shape[0] * weight.numel() / (time.perf_counter() - start))
    return best


def table(results: dict) -> str:
    """Return the results in Markdown: medians over the rounds."""
    lines = [
        f"{results['processor']}, {results['cores']} cores, torch {results['torch']}, {results['date']}.",
        "Whole processes, FASTA to file; real tokens; median of the rounds, which took turns.",
        "",
        "| model | contender | seconds | tokens/s | speedup of seqmill | peak memory | of bfloat16 GEMM peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, measured in results["models"].items():
        medians = {
            name: statistics.median(run["seconds"] for run in runs) for name, runs in measured["runs"].items() if runs
        }
        for name, seconds in medians.items():
            peak = max(run["peak_bytes"] for run in measured["runs"][name])
            share = measured["flop"] / seconds / measured["roofline_bfloat16_flops"]
            ratio = f"{seconds / medians['seqmill']:.1f}x" if "seqmill" in medians else ""
            lines.append(
                f"| {model} | {name} | {seconds:.1f} | {measured['tokens'] / seconds:,.0f} | {ratio} "
                f"| {peak / 1e9:.2f} GB | {share:.0%} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
