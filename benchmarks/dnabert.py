#!/usr/bin/env python3
"""Time whole processes, from FASTA to file, on this machine's CPU: seqmill and the published code of DNABERT-S.

Both use the same seeded weights of the full size, the same contigs of mixed length (random DNA, log-normal lengths as
in an assembly, 300 to 10,000 bases), and all cores. They take turns, and their embeddings are compared too.

    python benchmarks/dnabert.py --published FOLDER --output benchmarks/results/dnabert

FOLDER has the published code, see peer_dnabert.py. Writes a Markdown table and a JSON file.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch
from cpu import BENCHMARKS, timed

sys.path[:0] = [str(BENCHMARKS.parent / "scripts"), str(BENCHMARKS.parent / "tests/support")]

from dnabert_reference import save_folder, seeded_state
from seqmill import open_embeddings
from seqmill.base.machine import processor
from seqmill.spec.models import DNABERT_MODELS

MEDIAN_LENGTH, SPREAD = 2000, 0.9
SHORTEST, LONGEST = 300, 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, required=True, help="folder with the published code")
    parser.add_argument("--contigs", type=int, default=80, help="number of contigs (default: 80)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contender (default: 2)")
    parser.add_argument("--output", type=Path, required=True, help="writes OUTPUT.md and OUTPUT.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        num_bases = write_contigs(folder / "contigs.fna", arguments.contigs)
        architecture = DNABERT_MODELS["dnabert_s"]
        save_folder(seeded_state(architecture), architecture, folder / "model")
        commands = commands_of(arguments.published.resolve())
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for number in range(arguments.rounds):
            for name, command in commands.items():
                runs[name].append(timed(["bash", "-c", f"cd {folder} && {command}"]))
                print(f"round {number + 1}: {name}: {runs[name][-1]['seconds']:.1f} s", file=sys.stderr)
        exact = np.load(folder / "published.npy")
        differences = {
            name: compare(open_embeddings(folder / f"{name.split()[1]}.h5").array, exact)
            for name in commands
            if name.startswith("seqmill")
        }
        num_tokens = json.loads((folder / "bfloat16.status.json").read_text())["run"]["num_tokens"]
    results = {
        "date": date.today().isoformat(),
        "processor": processor()[0],
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "contigs": arguments.contigs,
        "bases": num_bases,
        "tokens": num_tokens,
        "runs": runs,
        "differences": differences,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    arguments.output.with_suffix(".md").write_text(table(results))
    print(table(results))


def write_contigs(path: Path, number: int) -> int:
    """Write seeded random contigs in random order; return the number of bases."""
    generator = np.random.default_rng(3)
    lengths = generator.lognormal(np.log(MEDIAN_LENGTH), SPREAD, number).clip(SHORTEST, LONGEST).astype(int)
    letters = np.frombuffer(b"ACGT", np.uint8)
    with path.open("w") as file:
        for contig, length in enumerate(lengths.tolist()):
            file.write(f">contig_{contig}\n{letters[generator.integers(0, 4, length)].tobytes().decode()}\n")
    return int(lengths.sum())


def commands_of(published: Path) -> dict[str, str]:
    """Return each contender's shell command, from the FASTA to its file."""
    python, scripts = sys.executable, BENCHMARKS.parent / "scripts"
    commands = {}
    for precision in ("bfloat16", "float32"):
        commands[f"seqmill {precision}"] = " && ".join(
            [
                f"{python} {scripts}/build_index.py --fasta contigs.fna --model model --output index.h5",
                f"{python} {scripts}/embed_shard.py --index index.h5 --rank 0 --world-size 1 --device cpu"
                f" --precision {precision} --audit-seconds 0 --output s.h5 --status {precision}.status.json",
                f"{python} {scripts}/merge_shards.py --index index.h5 --shards s.h5"
                f" --statuses {precision}.status.json --output {precision}.h5",
            ]
        )
    commands["published code, float32"] = (
        f"{python} {BENCHMARKS}/peer_dnabert.py {published} contigs.fna model published.npy"
    )
    return commands


def compare(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Return the worst cosine and the worst relative L2 error of an embedding."""
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(exact, axis=1)
    errors = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)
    return {"worst_cosine": float(((found * exact).sum(axis=1) / norms).min()), "worst_error": float(errors.max())}


def table(results: dict) -> str:
    """Return the results in Markdown: medians over the rounds."""
    lines = [
        f"{results['processor']}, {results['cores']} cores, torch {results['torch']}, {results['date']}.",
        f"Whole processes, FASTA to file: {results['contigs']} contigs, {results['bases']:,} bases, "
        f"{results['tokens']:,} tokens; median of the rounds, which took turns.",
        "",
        "| contender | seconds | bases/s | speedup over published | peak memory | worst cosine to it | worst error |",
        "|---|---|---|---|---|---|---|",
    ]
    medians = {name: statistics.median(run["seconds"] for run in runs) for name, runs in results["runs"].items()}
    published = medians["published code, float32"]
    for name, seconds in medians.items():
        peak = max(run["peak_bytes"] for run in results["runs"][name]) / 1e9
        found = results["differences"].get(name)
        compared = f"{found['worst_cosine']:.6f} | {found['worst_error']:.1e}" if found else "|"
        lines.append(
            f"| {name} | {seconds:.1f} | {results['bases'] / seconds:,.0f} | {published / seconds:.1f}x "
            f"| {peak:.2f} GB | {compared} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
