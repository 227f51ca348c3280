#!/usr/bin/env python3
"""Time the tokenization of contigs: seqmill's index step, only its tokens, and the tokenizers library alone.

All use the same random DNA in contigs of mixed length, the same tokenizer, and the same cores, in turns. The index step
reads a FASTA and writes index.h5; "tokens" turns the lines of records into uint16 (letters, cut, tokens); the library
gets clean strings, all in one call, and returns the ids of each. The tokens must be equal.

    python benchmarks/tokenization.py --output benchmarks/results/tokenization.md
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("scripts", "tests/support")]

from cut_contigs import LINE, contig_lengths
from seqmill.base.machine import processor
from seqmill.index.bpe import BpeTokenizer
from seqmill.index.build import build_index
from seqmill.index.letters import NucleotideLetters
from seqmill.index.segments import cut
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import UNTRAINED_TOKENIZER
from seqmill.store.index import open_index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="million bases (default: 100)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each method (default: 3)")
    parser.add_argument("--output", type=Path, required=True, help="the Markdown file to write")
    arguments = parser.parse_args()
    contigs = random_contigs(arguments.megabytes * 1_000_000)
    bodies = [b"".join(contig[at : at + LINE] + b"\n" for at in range(0, len(contig), LINE)) for contig in contigs]
    texts = [contig.decode("ascii") for contig in contigs]
    ours, library = BpeTokenizer.from_file(UNTRAINED_TOKENIZER), Tokenizer.from_file(str(UNTRAINED_TOKENIZER))
    seconds: dict[str, list[float]] = {"index step": [], "tokens": [], "tokenizers": []}
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            fasta, index = Path(folder, "contigs.fna"), Path(folder, "index.h5")
            fasta.write_bytes(b"".join(b">%d\n%s" % numbered for numbered in enumerate(bodies)))
            start = time.perf_counter()
            build_index(fasta, index, "untrained:dnabert_s", LengthPolicy("full", 0))
            seconds["index step"].append(time.perf_counter() - start)
            in_index = open_index(index).attributes["num_tokens"]
        start = time.perf_counter()
        tokens, _ = with_seqmill(ours, bodies)
        seconds["tokens"].append(time.perf_counter() - start)
        start = time.perf_counter()
        ids = [encoding.ids for encoding in library.encode_batch_fast(texts)]
        seconds["tokenizers"].append(time.perf_counter() - start)
        if len(tokens) != in_index or not np.array_equal(
            tokens, np.concatenate([np.array(one, np.uint16) for one in ids])
        ):
            sys.exit("the tokens differ")
        print(f"round {number + 1}: {', '.join(f'{way} {runs[-1]:.2f} s' for way, runs in seconds.items())}")
        del tokens, ids
    arguments.output.write_text(table(seconds, contigs))
    print(arguments.output.read_text())


def random_contigs(num_bases: int) -> list[bytes]:
    """Return random DNA with the lengths of the demo contigs."""
    generator = random.Random(1)
    contigs = []
    for length in contig_lengths(generator):
        contigs.append(generator.randbytes(min(length, num_bases)).translate(b"ACGT" * 64))
        num_bases -= len(contigs[-1])
        if num_bases == 0:
            return contigs
    raise AssertionError


def with_seqmill(tokenizer: BpeTokenizer, bodies: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the index step's result from the lines of records: all tokens, and the number in each."""
    letters = NucleotideLetters()
    return tokenizer.encode([segment for body in bodies for segment in cut(letters.clean(body))])


def table(seconds: dict[str, list[float]], contigs: list[bytes]) -> str:
    """Return the Markdown: median seconds and speed of each method, and the median of the rounds' ratios."""
    num_bases = sum(map(len, contigs))
    lines = [
        f"{processor()[0]}, {len(os.sched_getaffinity(0))} cores, tokenizers {version('tokenizers')}, "
        f"{date.today().isoformat()}. {len(contigs):,} contigs, {num_bases:,} bases.",
        "",
        "| method | seconds | Mb/s |",
        "|---|---|---|",
    ]
    for way, runs in seconds.items():
        median = statistics.median(runs)
        lines.append(f"| {way} | {median:.2f} | {num_bases / 1e6 / median:.1f} |")
    lines.append("")
    for way in ("index step", "tokens"):
        ratios = [library / ours for ours, library in zip(seconds[way], seconds["tokenizers"], strict=True)]
        lines.append(f"{way} / tokenizers, in speed: {statistics.median(ratios):.2f} (median of {len(ratios)} rounds).")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
