#!/usr/bin/env python3
"""Measure memory for one long protein embedded in full on a CPU, up to titin's 34,350 residues, and for fair-esm.

The proteins are random with UniProt's composition; the weights are seeded (8M). scripts/embed_shard.py embeds each
long protein alone and with 200 proteins of usual lengths. fair-esm gets only the long one and at most
--fair-esm-gigabytes of memory, because it stores length x length scores of all heads.

    python benchmarks/titin.py --output benchmarks/results/titin
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
from proteins import COMPOSITION, random_proteins, write_fasta
from scale import timed

BENCHMARKS = Path(__file__).parent
SCRIPTS = BENCHMARKS.parent / "scripts"
sys.path[:0] = [str(SCRIPTS), str(BENCHMARKS.parent / "tests/support")]

MODEL = "esm2_t6_8M_UR50D"
LENGTHS = (1022, 4096, 16384, 34350)
COMPANIONS = 200
MOST_RESIDUES = 1022  # of a companion
PRECISIONS = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="residues of the long protein")
    parser.add_argument("--fair-esm-gigabytes", type=float, default=8, help="memory limit for fair-esm (default: 8)")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.md and OUTPUT.json")
    parser.add_argument("--fair-esm", nargs=3, metavar=("FASTA", "CHECKPOINT", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    most_bytes = int(arguments.fair_esm_gigabytes * 1e9)
    if arguments.fair_esm:
        embed_by_fair_esm(*map(Path, arguments.fair_esm), most_bytes)
        return
    results = {"date": date.today().isoformat(), "cores": os.cpu_count(), "most_bytes": most_bytes, "lengths": {}}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_weights(Path(folder))
        for length in arguments.lengths:
            results["lengths"][str(length)] = measure(Path(folder), checkpoint, length, arguments.fair_esm_gigabytes)
            if arguments.output:
                arguments.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
                arguments.output.with_suffix(".md").write_text(table(results))
    print(table(results))


def save_weights(folder: Path) -> Path:
    """Save seeded weights as a fair-esm checkpoint, for both programs."""
    from reference import fair_esm_model, save_checkpoint
    from seqmill.spec.models import MODELS

    return save_checkpoint(fair_esm_model(MODELS[MODEL]), folder / f"{MODEL}.pt")


def measure(folder: Path, checkpoint: Path, length: int, gigabytes: float) -> dict:
    """Return seconds and own memory (bytes) of every run with a length; None for fair-esm if it did not fit."""
    generator = np.random.default_rng(length)
    shares = np.array(list(COMPOSITION.values()))
    long = "".join(generator.choice(list(COMPOSITION), length, p=shares / shares.sum()))
    usual = [sequence[:MOST_RESIDUES] for sequence in random_proteins(COMPANIONS)]
    runs, embedded = {}, {}
    for company, sequences in (("alone", [long]), (f"with {COMPANIONS}", [long, *usual])):
        write_fasta(folder / "proteins.faa", sequences)
        index = folder / "index.h5"
        full = ["--long-sequences", "full", "--output", index]
        build = [f"{SCRIPTS}/build_index.py", "--fasta", folder / "proteins.faa", "--model", checkpoint, *full]
        subprocess.run([sys.executable, *map(str, build)], check=True, stderr=subprocess.DEVNULL)
        for precision in PRECISIONS:
            name, shard = f"{precision} {company}", folder / f"{precision}.h5"
            embed = [f"{SCRIPTS}/embed_shard.py", "--index", index, "--rank", 0, "--world-size", 1, "--device", "cpu"]
            embed += ["--precision", precision, "--output", shard, "--status", shard.with_suffix(".status.json")]
            runs[name] = timed([sys.executable, *embed])
            embedded[name] = embedding_of_first(shard)
            print(f"{length}: {name}: {runs[name]}", file=sys.stderr)
    write_fasta(folder / "proteins.faa", [long])
    output = folder / f"fair_esm_{length}.npy"
    files = [folder / "proteins.faa", checkpoint, output]
    step = timed([sys.executable, __file__, "--fair-esm-gigabytes", gigabytes, "--fair-esm", *files])
    runs["fair-esm"] = step if output.exists() else None
    print(f"{length}: fair-esm: {runs['fair-esm']}", file=sys.stderr)
    exact = embedded["float32 alone"]
    references = {"bfloat16": embedded["bfloat16 alone"], **({"fair-esm": np.load(output)} if output.exists() else {})}
    errors = {name: float(np.linalg.norm(other - exact) / np.linalg.norm(exact)) for name, other in references.items()}
    return {"runs": runs, "relative_errors_to_float32": errors}


def embedding_of_first(shard: Path) -> np.ndarray:
    """Return the embedding of the longest sequence, which comes first."""
    import h5py

    with h5py.File(shard) as file:
        return file["embeddings"][0]


def embed_by_fair_esm(fasta: Path, checkpoint: Path, output: Path, most_bytes: int) -> None:
    """Write the mean of the only sequence's hidden states, in float32; nothing if memory is too small."""
    import torch
    from esm.pretrained import load_model_and_alphabet_core

    resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))
    with torch.serialization.safe_globals([argparse.Namespace]):
        model, alphabet = load_model_and_alphabet_core("esm2", torch.load(checkpoint, weights_only=True))
    sequence = fasta.read_text().split("\n")[1]
    _, _, tokens = alphabet.get_batch_converter()([("long", sequence)])
    try:
        with torch.no_grad():
            hidden = model.eval()(tokens, repr_layers=[model.num_layers])["representations"][model.num_layers]
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        return
    np.save(output, hidden[0, 1:-1].mean(0).numpy())


def table(results: dict) -> str:
    """Return the results in Markdown."""
    names = list(next(iter(results["lengths"].values()))["runs"])
    lines = [
        "`python benchmarks/titin.py --output benchmarks/results/titin`",
        "",
        f"{MODEL}, {results['cores']} cores shared with other work, {results['date']}. Peak own memory of the "
        "process in GB (RssAnon); in parentheses, seconds from start to end.",
        "",
        "| residues | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for length, measured in results["lengths"].items():
        cells = [
            f"{run['peak_bytes'] / 1e9:.2f} ({run['seconds']:.0f})" if run else f"over {results['most_bytes'] / 1e9:g}"
            for run in measured["runs"].values()
        ]
        lines.append(f"| {int(length):,} | " + " | ".join(cells) + " |")
    lines += ["", "Relative error (L2) to seqmill's float32 of the long protein's embedding:", ""]
    lines += ["| residues | bfloat16 | fair-esm |", "|---|---|---|"]
    for length, measured in results["lengths"].items():
        errors = measured["relative_errors_to_float32"]
        cells = [f"{errors[name]:.1e}" if name in errors else "" for name in ("bfloat16", "fair-esm")]
        lines.append(f"| {int(length):,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
