"""Cut nucleotide sequences into overlapping contigs of mixed lengths, like those of an assembly.

Contigs have log-normal lengths of 100 to 5,000 bases and random strands; their descriptions give the positions. One is
in lower case (soft-masked), one has a few N, and the last is a duplicate of another.

    PYTHONPATH=scripts python tests/support/cut_contigs.py tests/data/NC_005816.fna tests/data/NC_005816.contigs.fna
"""

import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from seqmill.index.fasta import FastaFile
from seqmill.index.letters import NucleotideLetters
from seqmill.index.segments import reverse_complement

MEDIAN_LENGTH, LOG_SPREAD = 700, 0.85
SHORTEST, LONGEST = 100, 5000
GAP = b"NNNNN"  # placed in the middle of one contig
LINE = 70


def write_contigs(fasta: Path, output: Path, coverage: int = 5, seed: int = 1) -> None:
    """Write contigs of all records of a FASTA file, `coverage` contig bases per input base."""
    letters, generator = NucleotideLetters(), random.Random(seed)
    with output.open("wb") as file:
        for block in FastaFile(fasta).blocks():
            for record in block:
                accession = record.id.rstrip("|").rpartition("|")[2]  # of gi|45478711|ref|NC_005816.1|
                contigs = cut_contigs(letters.clean(record.body), coverage, generator)
                for number, (description, contig) in enumerate(contigs, start=1):
                    lines = [contig[start : start + LINE] for start in range(0, len(contig), LINE)]
                    file.write(f">{accession}_contig_{number:03} {description}\n".encode())
                    file.write(b"\n".join(lines) + b"\n")


def contig_lengths(generator: random.Random) -> Iterator[int]:
    """Yield an endless sequence of lengths in bases."""
    while True:
        length = int(generator.lognormvariate(math.log(MEDIAN_LENGTH), LOG_SPREAD))
        yield min(max(length, SHORTEST), LONGEST)


def cut_contigs(sequence: bytes, coverage: int, generator: random.Random) -> list[tuple[str, bytes]]:
    """Return contigs with their descriptions: start-end (from 1, inclusive), strand, and any changes."""
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


if __name__ == "__main__":
    write_contigs(*map(Path, sys.argv[1:3]))
