#!/usr/bin/env python3
"""Compare `seqmill.load(...).embed` with fair-esm and with the worker of the workflow, on 1,000 random proteins.

    python benchmarks/library.py --model esm2_t6_8M_UR50D --rounds 5

Prints the worst relative error in float32 against fair-esm, the time of the library as a share of the worker's (the
median of rounds, one after the other in turn), and how long a call takes besides the forward of the model.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("scripts", "tests/support")]

from checkpoints import save_weights
from processor_kind import processor_kind
from proteins import random_proteins, write_fasta

import seqmill
from seqmill.base.files import read_json
from seqmill.model.pack import Pack
from seqmill.spec.models import MODELS
from sequences import relative_error

COUNT = 1000
SHORT = "MKTAYIAKQR"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="esm2_t6_8M_UR50D", help="name of an ESM-2 model")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed")
    arguments = parser.parse_args()
    print(f"{arguments.model} on {processor_kind()[0]}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_weights(arguments.model, MODELS[arguments.model], folder)
        checkpoint, fasta = folder / f"{arguments.model}.pt", folder / "proteins.faa"
        write_fasta(fasta, random_proteins(COUNT))
        print(f"float32, worst relative error against fair-esm: {error(checkpoint, fasta, folder):.1e}")
        for precision in ("float32", "bfloat16"):
            ratios = compare(checkpoint, fasta, folder, precision, arguments.rounds)
            shown = " ".join(f"{ratio:.3f}" for ratio in ratios)
            print(f"{precision}, time as a share of the worker's: {statistics.median(ratios):.3f} of {shown}")
        print(f"a call for one short protein besides the forward, in ms: {overhead(checkpoint)}")


def error(checkpoint: Path, fasta: Path, folder: Path) -> float:
    """Return the worst relative error of a protein's vector."""
    command = [sys.executable, Path(__file__).with_name("peer_fair_esm.py"), fasta, checkpoint, folder / "means.pt"]
    subprocess.run(command, check=True, capture_output=True)
    expected = torch.load(folder / "means.pt")
    found = seqmill.load(checkpoint, device="cpu", precision="float32").embed(fasta)
    return max(relative_error(vector, expected[f"p{row}"].numpy()) for row, vector in enumerate(found))


def compare(checkpoint: Path, fasta: Path, folder: Path, precision: str, rounds: int) -> list[float]:
    """Return the library's time divided by the worker's, for each round."""
    scripts, index = Path(__file__).parents[1] / "scripts", folder / "index.h5"
    command = [sys.executable, scripts / "build_index.py", "--fasta", fasta, "--model", checkpoint, "--output", index]
    subprocess.run(command, check=True, capture_output=True)
    model = seqmill.load(checkpoint, device="cpu", precision=precision)
    model.embed(fasta)
    ratios = []
    for number in range(rounds):
        made = folder / f"{precision} {number}"  # a folder of its own, or the worker would resume
        made.mkdir()
        worker = [sys.executable, scripts / "embed_shard.py", "--index", index, "--rank", "0", "--world-size", "1"]
        worker += ["--output", made / "shard_0-of-1.h5", "--status", made / "status.json", "--precision", precision]
        subprocess.run([*worker, "--device", "cpu", "--audit-seconds", "0"], check=True, capture_output=True)
        began = time.perf_counter()
        model.embed(fasta)
        ratios.append((time.perf_counter() - began) / read_json(made / "status.json")["seconds"]["compute"])
    return ratios


def overhead(checkpoint: Path) -> str:
    """Return by how much a call of `embed` for one short protein takes longer than the forward, on one thread as there.

    Both are medians of 50 calls; of three such differences, the median counts.
    """
    model = seqmill.load(checkpoint, device="cpu")
    tokens = np.frombuffer(b"\0" + model._tokenizer._letters.tokens(SHORT.encode()) + b"\2", np.uint8)
    pack = Pack.from_tokens(tokens, np.array([len(tokens)], np.int64))
    threads = torch.get_num_threads()
    differences, forwards = [], []
    for _ in range(3):
        whole = median_of(lambda: model.embed(SHORT))
        torch.set_num_threads(1)
        forwards.append(median_of(lambda: model._embed_pack(pack)))
        torch.set_num_threads(threads)
        differences.append(whole - forwards[-1])
    return f"{statistics.median(differences):.1f} (the forward: {statistics.median(forwards):.1f})"


def median_of(call: Callable[[], object]) -> float:
    """Return the median time of 50 calls, in ms."""
    times = []
    for _ in range(50):
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


if __name__ == "__main__":
    main()
