#!/usr/bin/env python3
"""Time exact cosine search in an embeddings file: seqmill.search, NumPy on the whole array, FAISS's flat index.

The vectors are as similar as those of proteins (a common part and noise: cosines around 0.9). Each method runs in its
own process, in turns, and the files are in the page cache. "load" is the time to prepare the first query: for NumPy, to
load the array and divide it by its norms; for FAISS, to load the index that seqmill exported.

    python benchmarks/search.py --output benchmarks/results/search.md
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parent.parent
sys.path[:0] = [str(REPOSITORY / "scripts"), str(REPOSITORY / "tests/support")]

from embeddings_file import random_blocks, write_blocks
from seqmill import open_embeddings, search
from seqmill.base.machine import processor
from seqmill.export.export import export_embeddings

K = 10
NOISE = 0.3
WAYS = ("seqmill", "numpy", "faiss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=500_000)
    parser.add_argument("--dimensions", type=int, default=1280, help="of 650M (default: 1280)")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 1000])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each method (default: 3)")
    parser.add_argument("--output", type=Path, help="the Markdown file to write")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # its own process: method, file, queries
    arguments = parser.parse_args()
    if arguments.one:
        way, path, number = arguments.one
        print(json.dumps(time_one(way, Path(path), int(number))))
        return
    if arguments.output is None:
        parser.error("--output is needed")
    runs: dict[tuple[str, int], list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "embeddings.h5")
        shape = (arguments.records, arguments.dimensions)
        common = next(random_blocks((1, shape[1]), seed=2))
        write_blocks(path, shape, (common + np.float32(NOISE) * block for block in random_blocks(shape)))
        export_embeddings(path, path.with_suffix(".faiss"), "faiss")
        for number in arguments.queries:
            for _ in range(arguments.rounds):
                for way in WAYS:
                    command = [sys.executable, __file__, "--one", way, path, str(number)]
                    process = subprocess.run(command, check=True, capture_output=True, text=True)
                    runs.setdefault((way, number), []).append(json.loads(process.stdout))
                    print(way, number, runs[way, number][-1]["seconds"])
    arguments.output.write_text(table(runs, shape))
    print(arguments.output.read_text())


def time_one(way: str, path: Path, number: int) -> dict:
    """Return the seconds to load and to search, the memory taken (MB), and the rows found."""
    embeddings = open_embeddings(path)
    queries = embeddings[np.linspace(0, len(embeddings) - 1, number).astype(int)]
    before = peak()
    start = time.perf_counter()
    if way == "numpy":
        array = np.array(embeddings.array)
        array /= np.linalg.norm(array, axis=1, keepdims=True)
    elif way == "faiss":
        import faiss

        index = faiss.read_index(str(path.with_suffix(".faiss")))
    loaded = time.perf_counter()
    if way == "seqmill":
        rows = search(queries, embeddings, K)["row"].to_numpy().reshape(-1, K)
    elif way == "numpy":
        rows = np.empty((number, K), np.int64)
        for first in range(0, number, 100):  # for all queries at once, the scores would take 4 bytes per pair
            scores = queries[first : first + 100] @ array.T
            best = np.argpartition(scores, -K, axis=1)[:, -K:]
            order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
            rows[first : first + 100] = np.take_along_axis(best, order, axis=1)
    else:
        _, rows = index.search(queries / np.linalg.norm(queries, axis=1, keepdims=True), K)
    found = time.perf_counter()
    return {
        "load": loaded - start,
        "seconds": found - loaded,
        "megabytes": peak() - before,
        "rows": rows.tolist(),
    }


def peak() -> int:
    """Return the peak memory of this process in MB (getrusage would count its parent's)."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10


def table(runs: dict[tuple[str, int], list[dict]], shape: tuple[int, int]) -> str:
    """Return the Markdown: medians of the rounds."""
    lines = [
        f"{processor()[0]}, {len(os.sched_getaffinity(0))} cores, NumPy {np.__version__}, "
        f"FAISS {version('faiss-cpu')}, {date.today().isoformat()}. {shape[0]:,} records of {shape[1]:,} dimensions, "
        f"k = {K}, median of {len(next(iter(runs.values())))} rounds.",
        "",
        "| queries | method | load, s | search, s | memory, MB | rows that differ from seqmill's |",
        "|---|---|---|---|---|---|",
    ]
    for (way, number), found in runs.items():
        load, seconds, memory = (
            statistics.median(run[name] for run in found) for name in ("load", "seconds", "megabytes")
        )
        unlike = np.count_nonzero(np.array(found[-1]["rows"]) != np.array(runs["seqmill", number][-1]["rows"]))
        lines.append(f"| {number:,} | {way} | {load:.2f} | {seconds:.2f} | {memory:,.0f} | {unlike} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
