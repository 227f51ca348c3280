#!/usr/bin/env python3
"""Time the comparison of existing results with the request, at the start of a run.

The results are 1 and 100 datasets with two shards each, and one dataset of many million records: unchanged, and with a
FASTA that was touched, which is read once.

    python benchmarks/stale.py --millions 10

Ten million need some 5 GB in the folder for temporary files (TMPDIR). There is no model: vectors are stand-ins.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import scale

from seqmill.base.input_files import KnownDigests
from seqmill.base.machine import processor
from seqmill.index.build import build_index
from seqmill.merge.merge import merge_shards
from seqmill.run.stale import Request, find_fasta_edit, stale_results
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import find_model
from seqmill.spec.outputs import Outputs
from seqmill.store.layout import status_path_of

RESIDUES = 30  # per sequence; the length does not matter here
scale.HIDDEN_DIM = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=10, help="million records in the large result")
    number = round(parser.parse_args().millions * 1e6)
    print(processor()[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = folder / "small"
        make_result(small, 100)
        copies = [Path(shutil.copytree(small, folder / f"copy{number}")) for number in range(100)]
        compare(copies[:1], "1 dataset, first in this process")
        compare(copies[:1], "1 dataset")
        compare(copies, "100 datasets, copied: each FASTA is read once")
        compare(copies, "100 datasets")
        large = folder / "large"
        make_result(large, number)
        compare([large], f"{number:,} records")
        os.utime(large / "a.fa")
        compare([large], f"{number:,} records, FASTA of {(large / 'a.fa').stat().st_size / 1e9:.2f} GB touched")
        compare([large], f"{number:,} records, the next time")


def make_result(folder: Path, number: int) -> None:
    """Write a FASTA, its index, two shards, and the merged result, like a finished run."""
    folder.mkdir()
    fasta, index = folder / "a.fa", folder / "index.h5"
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
    generator = np.random.default_rng(0)
    with fasta.open("wb") as file:
        for start in range(0, number, scale.BLOCK):
            rows = letters[generator.integers(0, 20, (min(scale.BLOCK, number - start), RESIDUES))]
            file.write(b"".join(b">r%d\n%s\n" % pair for pair in enumerate(map(bytes, rows), start)))
    build_index(fasta, index, scale.MODEL, LengthPolicy())
    shards = shards_of(folder)
    for rank in range(scale.WORLD_SIZE):
        scale.write_stand_in_shard(index, rank)
    outputs = [folder / name for name in ("embeddings.h5", "records.tsv.gz", "manifest.json")]
    merge_shards(index, shards, [status_path_of(shard) for shard in shards], *outputs)


def shards_of(folder: Path) -> list[Path]:
    return [folder / f"shard_{rank}-of-{scale.WORLD_SIZE}.h5" for rank in range(scale.WORLD_SIZE)]


def compare(folders: list[Path], what: str) -> None:
    """Compare each folder with the request, like the start of a run; print the seconds."""
    began = time.perf_counter()
    digests = KnownDigests(folders[0].parent / "digests.json")
    for folder in folders:
        request = Request(folder / "a.fa", find_model(scale.MODEL), LengthPolicy(), Outputs())
        assert find_fasta_edit(folder, request.fasta, digests) == ""
        stale = stale_results(folder, request, shards_of(folder), digests)
        assert stale == {}, stale
    digests.save()
    print(f"{what}: {time.perf_counter() - began:.3f} s")


if __name__ == "__main__":
    main()
