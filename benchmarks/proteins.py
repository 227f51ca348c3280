#!/usr/bin/env python3
"""Random sequences with the lengths of real ones; as a program, writes a FASTA of proteins."""

import argparse
from pathlib import Path

import numpy as np

# UniProtKB/Swiss-Prot release statistics: amino-acid composition in percent.
COMPOSITION = {
    **{"A": 8.25, "Q": 3.93, "L": 9.64, "S": 6.65, "R": 5.52, "E": 6.71, "K": 5.79, "T": 5.36, "N": 4.06, "G": 7.07},
    **{"M": 2.41, "W": 1.10, "D": 5.46, "H": 2.27, "F": 3.86, "Y": 2.92, "C": 1.38, "I": 5.90, "P": 4.74, "V": 6.86},
}
MEDIAN_LENGTH = 300
LOG_SPREAD = 0.65  # of the log-normal distribution: about 3 % are longer than 1022


def random_proteins(count: int, seed: int = 1) -> list[str]:
    """Return seeded proteins with log-normal lengths, median 300 residues, 30 to 5000."""
    generator = np.random.default_rng(seed)
    lengths = np.exp(generator.normal(np.log(MEDIAN_LENGTH), LOG_SPREAD, count)).astype(int).clip(30, 5000)
    letters = np.array(list(COMPOSITION))
    weights = np.array(list(COMPOSITION.values()))
    return ["".join(generator.choice(letters, length, p=weights / weights.sum())) for length in lengths]


def random_contigs(count: int, seed: int = 3) -> list[str]:
    """Return seeded random DNA with log-normal lengths as in an assembly, median 2,000 bases, 300 to 10,000."""
    generator = np.random.default_rng(seed)
    lengths = generator.lognormal(np.log(2000), 0.9, count).clip(300, 10_000).astype(int)
    letters = np.frombuffer(b"ACGT", np.uint8)
    return [letters[generator.integers(0, 4, length)].tobytes().decode() for length in lengths.tolist()]


def write_fasta(path: Path, sequences: list[str]) -> None:
    """Write the sequences with the ids p0, p1, ..."""
    path.write_text("".join(f">p{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, help="number of proteins")
    parser.add_argument("output", type=Path, help="the FASTA file to write")
    arguments = parser.parse_args()
    write_fasta(arguments.output, random_proteins(arguments.count))
