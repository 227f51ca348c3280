"""The pipeline without Snakemake: FASTA text in, the paths of what it makes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from seqpack.index_build import LengthPolicy, build_index
from seqpack.merge import merge_shards
from seqpack.verify import status_path_of
from seqpack.worker import ShardTask, embed_shard

REPOSITORY = Path(__file__).parent.parent
SCRIPTS = REPOSITORY / "scripts"
DEMO = REPOSITORY / "tests/data/NC_000932.faa"
MODEL = "untrained:esm2_t6_8M_UR50D"


@dataclass
class Run:
    """A folder with an index, shards and merged results."""

    folder: Path
    world_size: int

    @property
    def index(self) -> Path:
        return self.folder / "index.h5"

    @property
    def embeddings(self) -> Path:
        return self.folder / "embeddings.h5"

    @property
    def manifest(self) -> dict:
        return json.loads((self.folder / "manifest.json").read_text())

    @property
    def shards(self) -> list[Path]:
        return [self.folder / f"shard_{rank}-of-{self.world_size}.h5" for rank in range(self.world_size)]

    @property
    def statuses(self) -> list[Path]:
        return [status_path_of(shard) for shard in self.shards]

    def build(self, fasta: Path, model: str = MODEL, policy: LengthPolicy | None = None) -> Run:
        build_index(fasta, self.index, model, policy or LengthPolicy())
        return self

    def embed(self, precision: str = "float32", threads: int = 0) -> Run:
        for rank, (shard, status) in enumerate(zip(self.shards, self.statuses, strict=True)):
            task = ShardTask(self.index, rank, self.world_size, shard, status, device="cpu", precision=precision)
            embed_shard(replace(task, threads=threads, audit_seconds=0))
        return self

    def merge(self) -> Run:
        folder = self.folder
        merge_shards(
            self.index,
            self.shards,
            self.statuses,
            self.embeddings,
            folder / "records.tsv.gz",
            folder / "manifest.json",
        )
        return self


def run_script(name: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a program of scripts/ as a user would."""
    command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
