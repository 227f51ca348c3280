#!/usr/bin/env python3
"""Measure time and memory of the steps around the model at 0.1, 1, and 10 million proteins: index, shards, merge.

There is no model: each sequence gets a stand-in vector, which the real shard writer writes in two shards, one after
the other. For comparison, `samtools faidx` reads the same FASTA, and dd with fsync copies the merged file, which has as
many bytes as the merge reads and writes. Each step reads its files from the disk: they are dropped from the page cache
before it begins.

    python benchmarks/scale.py --millions 0.1 1 10 --output benchmarks/results/scale

Ten million need some 40 GB in the folder for temporary files (TMPDIR).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import date, datetime
from pathlib import Path

import numpy as np
from proteins import COMPOSITION, LOG_SPREAD, MEDIAN_LENGTH

BENCHMARKS = Path(__file__).parent
SCRIPTS = BENCHMARKS.parent / "scripts"

MODEL, HIDDEN_DIM = "untrained:esm2_t6_8M_UR50D", 320
WORLD_SIZE = 2
BLOCK = 100_000  # records written, or vectors made, at a time
LINE = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="+", default=[0.1, 1, 10], help="million proteins")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.md and OUTPUT.json")
    parser.add_argument("--stand-in", nargs=2, metavar=("INDEX", "RANK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stand_in:
        write_stand_in_shard(Path(arguments.stand_in[0]), int(arguments.stand_in[1]))
        return
    results = {"date": date.today().isoformat(), "cores": os.cpu_count(), "sizes": {}}
    for millions in arguments.millions:
        with tempfile.TemporaryDirectory() as folder:
            results["sizes"][str(millions)] = measure(Path(folder), round(millions * 1e6))
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
            arguments.output.with_suffix(".md").write_text(table(results))
    print(table(results))


def measure(folder: Path, number: int) -> dict:
    """Return bytes, and seconds and memory (bytes) of every step."""
    fasta, index = folder / "proteins.faa", folder / "index.h5"
    shards = [folder / f"shard_{rank}-of-{WORLD_SIZE}.h5" for rank in range(WORLD_SIZE)]
    write_fasta(fasta, number)
    python = sys.executable
    steps = {}
    if shutil.which("samtools"):
        steps["samtools faidx"] = timed(["samtools", "faidx", str(fasta)], fasta)
    build = [python, f"{SCRIPTS}/build_index.py", "--fasta", fasta, "--model", MODEL, "--output", index]
    steps["index"] = timed(build, fasta)
    each = [timed([python, __file__, "--stand-in", index, str(rank)], index) for rank in range(WORLD_SIZE)]
    steps["shards"] = {
        "seconds": sum(step["seconds"] for step in each),
        "cpu_seconds": sum(step["cpu_seconds"] for step in each),
        "peak_bytes": max(step["peak_bytes"] for step in each),
    }
    merged = folder / "embeddings.h5"
    merge = [python, f"{SCRIPTS}/merge_shards.py", "--index", index, "--shards", *shards, "--output", merged]
    steps["merge"] = timed(merge, index, *shards)
    size = merged.stat().st_size
    copied = folder / "copied"
    steps["copy"] = timed(["dd", f"if={merged}", f"of={copied}", "bs=16M", "conv=fsync"], merged)
    print(json.dumps(steps), file=sys.stderr)
    return {
        "proteins": number,
        "fasta_bytes": fasta.stat().st_size,
        "index_bytes": index.stat().st_size,
        "merged_bytes": size,
        "steps": steps,
    }


def write_fasta(path: Path, number: int) -> None:
    """Write seeded proteins with lengths and composition as UniProt's, in lines of 60."""
    generator = np.random.default_rng(1)
    letters = np.frombuffer("".join(COMPOSITION).encode(), np.uint8)
    shares = np.array(list(COMPOSITION.values()))
    # A table of 64 Ki letters in these proportions: a random index is much faster than a weighted choice.
    lookup = np.repeat(letters, np.diff(np.round(np.cumsum([0, *shares]) / shares.sum() * (1 << 16)).astype(int)))
    with path.open("wb") as file:
        for first in range(0, number, BLOCK):
            count = min(BLOCK, number - first)
            lengths = np.exp(generator.normal(np.log(MEDIAN_LENGTH), LOG_SPREAD, count)).astype(int).clip(30, 5000)
            residues = lookup[generator.integers(0, 1 << 16, int(lengths.sum()), np.uint16)].tobytes()
            ends = np.cumsum(lengths).tolist()
            records = []
            for record, (begin, end) in enumerate(zip([0, *ends], ends, strict=False), start=first):
                lines = [residues[at : min(at + LINE, end)] for at in range(begin, end, LINE)]
                records.append(b">UniRef50_A%09d protein n=1 Tax=synthetic\n%s\n" % (record, b"\n".join(lines)))
            file.write(b"".join(records))


def write_stand_in_shard(index_path: Path, rank: int) -> None:
    """Write a rank's shard and status as a worker would, with vectors made from each sequence's digest."""
    from seqmill.base.files import sha256_of_file
    from seqmill.spec.fingerprint import Fingerprint
    from seqmill.spec.packing import packs_of_rank, rows_of_rank
    from seqmill.store.index import open_index
    from seqmill.store.shards import new_shard
    from seqmill.store.status import COMPLETE, ShardStatus, write_status

    index = open_index(index_path)
    path = index_path.with_name(f"shard_{rank}-of-{WORLD_SIZE}.h5")
    rows = rows_of_rank(index.pack_offsets, rank, WORLD_SIZE)
    fingerprint = Fingerprint(index.digest, MODEL, "stand-in", "6", "mean", "float32").attributes()
    attributes = {**fingerprint, "rank": rank, "world_size": WORLD_SIZE, "num_layers": 6, "computed_by": "stand-in"}
    attributes |= {"audit_sequences": 0, "audit_reference": "none: there is no model"}
    with new_shard(path, index, rows, rows[:0], HIDDEN_DIM, attributes) as shard:
        for pack in packs_of_rank(index.num_packs, rank, WORLD_SIZE):
            digests = index.sequence_digests[index.pack_offsets[pack] : index.pack_offsets[pack + 1]]
            shard.append(np.tile(digests, HIDDEN_DIM // 16).astype(np.float32))
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    status = ShardStatus(rank, WORLD_SIZE, COMPLETE, str(path), started=now, ended=now, num_sequences=len(rows))
    status.fingerprint = fingerprint
    status.shard_sha256, status.shard_bytes = sha256_of_file(path), path.stat().st_size
    write_status(path.with_suffix(".status.json"), status)


def timed(command: list[object], *inputs: Path) -> dict[str, float]:
    """Run a command that reads `inputs`; return wall and CPU seconds and its peak own memory in bytes.

    Own memory excludes pages of mapped files, which the kernel takes back when memory is short. It is sampled 50 times
    per second.
    """
    for path in inputs:
        drop_from_memory(path)
    before = os.times()
    start = time.perf_counter()
    child = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    peak = 0
    while child.poll() is None:
        with suppress(OSError, TypeError):  # the process has just ended
            found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{child.pid}/status").read_text())
            peak = max(peak, int(found[1]) * 1024)
        time.sleep(0.02)
    if child.returncode:
        raise SystemExit(f"failed: {command}")
    seconds, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "peak_bytes": peak}


def drop_from_memory(path: Path) -> None:
    """Flush a file to the disk and drop it from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(results: dict) -> str:
    """Return the results in Markdown."""
    lines = [
        f"{results['cores']} cores, {results['date']}; {WORLD_SIZE} shards of {HIDDEN_DIM} dimensions, in turn.",
        "",
        "| proteins | FASTA | step | seconds | microseconds each | CPU seconds | own memory | compared with |",
        "|---|---|---|---|---|---|---|---|",
    ]
    against = {"index": "samtools faidx", "merge": "copy"}
    for size in results["sizes"].values():
        steps = size["steps"]
        for name, step in steps.items():
            other = steps.get(against.get(name, ""))
            ratio = f"{step['seconds'] / other['seconds']:.1f}x {against[name]}" if other else ""
            lines.append(
                f"| {size['proteins']:,} | {size['fasta_bytes'] / 1e9:.2f} GB | {name} | {step['seconds']:.1f} "
                f"| {step['seconds'] / size['proteins'] * 1e6:.1f} | {step['cpu_seconds']:.1f} "
                f"| {step['peak_bytes'] / 1e9:.2f} GB | {ratio} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
