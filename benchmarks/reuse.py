#!/usr/bin/env python3
"""Measure time and memory for finding sequences in an earlier result of many million rows, by digests alone.

The FASTA has the same sequences and 1 % more.

    python benchmarks/reuse.py --millions 10
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from seqmill.index.order import find_reused
from seqmill.spec.fingerprint import Fingerprint
from seqmill.store.reuse import Source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=10, help="million sequences in the earlier result")
    number = round(parser.parse_args().millions * 1e6)
    wanted = np.random.default_rng(0).integers(0, 256, (number + number // 100, 16), np.uint8)
    with tempfile.NamedTemporaryFile() as file:
        wanted[:number].tofile(file)
        file.flush()
        digests = np.memmap(file.name, np.uint8, "r", shape=(number, 16))
        source = Source(Path(file.name), {}, Fingerprint(*6 * [""]), digests, [])
        before, began = peak(), time.perf_counter()
        files, rows = find_reused(wanted, [source])
        seconds = time.perf_counter() - began
    assert (rows[:number] == np.arange(number)).all()
    assert (files[number:] == -1).all()
    print(f"{number:,} rows: {seconds:.1f} s, peak {peak():.2f} GB, of which {before:.2f} GB before the look-up")


def peak() -> float:
    """Return the peak memory of this process, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
