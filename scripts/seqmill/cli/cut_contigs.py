"""Cut nucleotide sequences into overlapping contigs of mixed lengths, like those of an assembly.

Contigs have log-normal lengths of 100 to 5,000 bases and random strands; their descriptions give the positions. One is
in lower case (soft-masked), one has a few N, and the last is a duplicate of another.

    python scripts/cut_contigs.py --fasta tests/data/NC_005816.fna --output tests/data/NC_005816.contigs.fna
"""

import argparse
import math
import random
from collections.abc import Iterator
from pathlib import Path

from seqmill.cli import program

MEDIAN_LENGTH, LOG_SPREAD = 700, 0.85
SHORTEST, LONGEST = 100, 5000
GAP = b"NNNNN"  # placed in the middle of one contig
LINE = 70


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", type=Path, required=True, help="nucleotides; plain, gzip, bgzip or zstd")
    parser.add_argument("--output", type=Path, required=True, help="the FASTA file of contigs to write")
    parser.add_argument(
        "--coverage", type=program.at_least(1), default=5, help="contig bases per input base (default: 5)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the random generator (default: 1)")
    return parser.parse_args()


def main() -> int:
    program.start_log()
    arguments = parse_arguments()

    def work() -> None:
        from seqmill.base.files import refuse_to_replace, whole_or_absent
        from seqmill.index.fasta import FastaFile
        from seqmill.index.letters import NucleotideLetters

        refuse_to_replace(arguments.fasta, arguments.output)
        letters, generator = NucleotideLetters(), random.Random(arguments.seed)
        with whole_or_absent(arguments.output) as temporary, temporary.open("wb") as output:
            for block in FastaFile(arguments.fasta).blocks():
                for record in block:
                    accession = record.id.rstrip("|").rpartition("|")[2]  # from gi|45478711|ref|NC_005816.1|
                    contigs = cut_contigs(letters.clean(record.body), arguments.coverage, generator)
                    for number, (description, contig) in enumerate(contigs, start=1):
                        lines = [contig[start : start + LINE] for start in range(0, len(contig), LINE)]
                        output.write(f">{accession}_contig_{number:03} {description}\n".encode())
                        output.write(b"\n".join(lines) + b"\n")

    return program.run(work)


def contig_lengths(generator: random.Random) -> Iterator[int]:
    """Yield an endless sequence of lengths in bases."""
    while True:
        length = int(generator.lognormvariate(math.log(MEDIAN_LENGTH), LOG_SPREAD))
        yield min(max(length, SHORTEST), LONGEST)


def cut_contigs(sequence: bytes, coverage: int, generator: random.Random) -> list[tuple[str, bytes]]:
    """Return contigs with their descriptions: start-end (from 1, inclusive), strand, and any changes."""
    from seqmill.index.segments import reverse_complement

    contigs = []
    missing = coverage * len(sequence)
    for wanted in contig_lengths(generator):
        length = min(wanted, len(sequence))
        start = generator.randint(0, len(sequence) - length)
        strand = generator.choice("+-")
        contig = sequence[start : start + length]
        contig = contig if strand == "+" else reverse_complement(contig)
        contigs.append((f"{start + 1}-{start + length} {strand}", contig))
        missing -= length
        if missing <= 0:
            break
    masked, gapped, copied = (len(contigs) * part // 4 for part in (1, 2, 3))
    contigs.append((f"{contigs[copied][0]} duplicate of {copied + 1:03}", contigs[copied][1]))
    description, contig = contigs[masked]
    contigs[masked] = (f"{description} soft-masked", contig.lower())
    description, contig = contigs[gapped]
    middle = len(contig) // 2
    contigs[gapped] = (f"{description} with a gap", contig[:middle] + GAP + contig[middle + len(GAP) :])
    return contigs
