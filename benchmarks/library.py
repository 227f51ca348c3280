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
from sequences import relative_error

COUNT = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="esm2_t6_8M_UR50D", help="name of an ESM-2 model")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed")
    arguments = parser.parse_args()
    print(f"{arguments.model} on {processor_kind()[0]}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_weights(arguments.model, folder)
        checkpoint, fasta = folder / f"{arguments.model}.pt", folder / "proteins.faa"
        write_fasta(fasta, random_proteins(COUNT))
        print(f"float32, worst relative error against fair-esm: {error(checkpoint, fasta, folder):.1e}")
        for precision in ("float32", "bfloat16"):
            ratios = compare(checkpoint, fasta, folder, precision, arguments.rounds)
            shown = " ".join(f"{ratio:.3f}" for ratio in ratios)
            print(f"{precision}, time as a share of the worker's: {statistics.median(ratios):.3f} of {shown}")
        print("a call besides the forward, in ms: " + overhead(checkpoint))


def error(checkpoint: Path, fasta: Path, folder: Path) -> float:
    """Return the worst relative error of a protein's vector."""
    command = [sys.executable, Path(__file__).with_name("peer_fair_esm.py"), fasta, checkpoint, folder / "means.pt"]
    subprocess.run(command, check=True, capture_output=True)
    expected = torch.load(folder / "means.pt")
    found = seqmill.load(checkpoint, device="cpu", precision="float32").embed(fasta)
    return max(relative_error(vector, expected[f"p{row}"].numpy()) for row, vector in enumerate(found))


def compare(checkpoint: Path, fasta: Path, folder: Path, precision: str, rounds: int) -> list[float]:
    """Return the library's time divided by the worker's, for each round."""
    scripts = Path(__file__).parents[1] / "scripts"
    index, shard, status = folder / "index.h5", folder / "shard_0-of-1.h5", folder / "status.json"
    command = [sys.executable, scripts / "build_index.py", "--fasta", fasta, "--model", checkpoint, "--output", index]
    subprocess.run(command, check=True, capture_output=True)
    worker = [sys.executable, scripts / "embed_shard.py", "--index", index, "--rank", "0", "--world-size", "1"]
    worker += ["--output", shard, "--status", status, "--precision", precision, "--device", "cpu"]
    worker += ["--audit-seconds", "0"]
    model = seqmill.load(checkpoint, device="cpu", precision=precision)
    model.embed(fasta)
    ratios = []
    for _ in range(rounds):
        shard.unlink(missing_ok=True)
        subprocess.run(worker, check=True, capture_output=True)
        began = time.perf_counter()
        model.embed(fasta)
        ratios.append((time.perf_counter() - began) / read_json(status)["seconds"]["compute"])
    return ratios


def overhead(checkpoint: Path) -> str:
    """Return by how much a call of `embed` takes longer than the model's forward, for 1 and for 100 short proteins."""
    model = seqmill.load(checkpoint, device="cpu")
    found = []
    for sequences in (["MKTAYIAKQR"], random_proteins(1000)[:100]):
        tokens = [np.frombuffer(model._tokenizer._letters.tokens(one.encode()), np.uint8) for one in sequences]
        framed = [np.concatenate(([0], one[:1022], [2])).astype(np.uint8) for one in tokens]
        framed.sort(key=len, reverse=True)
        pack = Pack.from_tokens(np.concatenate(framed), np.array([len(one) for one in framed], np.int64))
        pieces = pack.split(2048)
        whole, forward = [], []
        for _ in range(50 if len(sequences) == 1 else 5):
            began = time.perf_counter()
            model.embed(sequences)
            whole.append(time.perf_counter() - began)
            began = time.perf_counter()
            for piece in pieces:
                model._embed_pack(piece)
            forward.append(time.perf_counter() - began)
        difference = 1000 * (statistics.median(whole) - statistics.median(forward))
        found.append(f"{difference:.1f} for {len(sequences)} ({1000 * statistics.median(forward):.1f} for the forward)")
    return ", ".join(found)


if __name__ == "__main__":
    main()
