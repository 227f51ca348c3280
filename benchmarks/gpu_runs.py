"""Runs of the workflow's programs on a GPU, each in a folder, compared with an undisturbed run."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np
from gpu_files import write_sequences
from gpu_sizes import SIZES

from seqmill.index.build import build_index
from seqmill.merge.merge import merge_shards
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import MODELS
from seqmill.store.layout import status_path_of

PROGRAM = Path(__file__).parents[1] / "scripts/embed_shard.py"
SETTINGS = ("--device", "cuda", "--precision", "bfloat16", "--audit-seconds", "0")
SECONDS = 200
# Runs a worker, after its torch was limited to a share of the memory.
LIMITED = """
import os, runpy, sys
import torch
torch.cuda.set_per_process_memory_fraction(float(os.environ["FRACTION"]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Takes all but so many bytes of the GPU's memory, says so, and keeps them until its input ends.
BALLAST = """
import sys, torch
left = int(sys.argv[1])
held = torch.empty(max(torch.cuda.mem_get_info()[0] - left, 0), dtype=torch.uint8, device="cuda")
print(len(held), flush=True)
sys.stdin.read()
"""


class Runs:
    """Runs of one index below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def index(self) -> Path:
        fasta, index = self.folder / "sequences.fasta", self.folder / "index.h5"
        write_sequences(fasta, SIZES.hard_model, SIZES.hard_tokens)
        build_index(fasta, index, f"untrained:{SIZES.hard_model}", LengthPolicy())
        return index

    @cached_property
    def undisturbed(self) -> np.ndarray:
        """Embeddings of one rank."""
        folder = self.new("undisturbed", 1)
        self.finish(folder, 0, 1)
        return self.merged(folder, 1)

    def new(self, name: str, world_size: int) -> Path:
        folder = self.folder / f"{name}-{world_size}"
        folder.mkdir(exist_ok=True)
        return folder

    def shard(self, folder: Path, rank: int, world_size: int) -> Path:
        return folder / f"shard_{rank}-of-{world_size}.h5"

    def start(
        self, folder: Path, rank: int, world_size: int, *more: str, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a worker; its log is its standard error."""
        shard = self.shard(folder, rank, world_size)
        command = [
            sys.executable,
            *(("-c", LIMITED) if environment and "FRACTION" in environment else ()),
            str(PROGRAM),
        ]
        command += ["--index", str(self.index), "--rank", str(rank), "--world-size", str(world_size)]
        command += [
            "--output",
            str(shard),
            "--status",
            str(status_path_of(shard)),
            *SETTINGS,
            "--parent",
            str(os.getpid()),
            *more,
        ]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **(environment or {})})

    def finish(self, folder: Path, rank: int, world_size: int, **options: dict[str, str]) -> dict:
        """Run a worker to its end and return its status; raise its last line if it fails."""
        worker = self.start(folder, rank, world_size, **options)
        try:
            _, errors = worker.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            raise
        if worker.returncode:
            raise ValueError(errors.strip().splitlines()[-1] if errors.strip() else f"ended with {worker.returncode}")
        return json.loads(status_path_of(self.shard(folder, rank, world_size)).read_text())

    def merged(self, folder: Path, world_size: int) -> np.ndarray:
        shards = [self.shard(folder, rank, world_size) for rank in range(world_size)]
        outputs = [folder / name for name in ("embeddings.h5", "records.tsv.gz", "manifest.json")]
        merge_shards(self.index, shards, list(map(status_path_of, shards)), *outputs)
        with h5py.File(outputs[0]) as file:
            return file["embeddings"][:]

    def merged_alike(self, folder: Path, world_size: int) -> bool:
        """Merge; return True, or raise a ValueError if a bit differs from the undisturbed run's."""
        different = int((self.merged(folder, world_size) != self.undisturbed).any(axis=1).sum())
        if different:
            raise ValueError(f"{different} of {len(self.undisturbed)} embeddings differ from those of one rank")
        return True

    def same_bits(self, name: str, world_size: int) -> bool:
        folder = self.new(name, world_size)
        for rank in range(world_size):
            self.finish(folder, rank, world_size)
        return self.merged_alike(folder, world_size)

    def difference(self, folder: Path, world_size: int) -> float:
        """Merge; return the worst relative error of an embedding against the undisturbed run's."""
        found, expected = self.merged(folder, world_size), self.undisturbed
        return float((np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())

    @contextmanager
    def little_memory(self, how: str, spare: float) -> Iterator[dict[str, str]]:
        """Leave a worker memory for its weights and `spare` bytes; yield its environment."""
        import torch

        assert len(self.undisturbed)  # computed before the memory is short
        needed = int(2 * MODELS[SIZES.hard_model].matrix_parameters + spare)
        if how == "fraction":
            yield {"FRACTION": str(min(needed / torch.cuda.mem_get_info()[1], 1.0))}
            return
        ballast = [sys.executable, "-c", BALLAST, str(needed)]
        with subprocess.Popen(ballast, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            try:
                yield {}
            finally:
                holder.communicate("")
