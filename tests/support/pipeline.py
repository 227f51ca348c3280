"""The pipeline without Snakemake: takes FASTA text, returns the paths of its outputs."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from seqmill.embedding.part_writer import PartWriter
from seqmill.embedding.resume import DonePacks
from seqmill.embedding.worker import embed_shard
from seqmill.index.build import build_index
from seqmill.merge.merge import merge_shards
from seqmill.spec.fingerprint import Fingerprint
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.task import ComputeSettings, ShardTask
from seqmill.store.index import Index, open_index
from seqmill.store.layout import status_path_of
from seqmill.store.part_file import PackResult
from seqmill.store.parts import PartStore
from seqmill.store.shards import open_shard

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "scripts"
HELD = str(REPOSITORY / "tests/held")  # on PYTHONPATH it pauses workers during a run, see sitecustomize.py there
# As PYTHONPATH it shortens the waits of downloads.
IMPATIENT = os.pathsep.join([str(REPOSITORY / "tests/impatient"), str(SCRIPTS)])
SUPPORT = REPOSITORY / "tests/support"
DEMO = REPOSITORY / "tests/data/NC_000932.faa"
CONTIGS_DEMO = REPOSITORY / "tests/data/NC_005816.contigs.fna"
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

    def build(
        self, fasta: Path, model: str = MODEL, policy: LengthPolicy | None = None, reuse: Sequence[Path] = ()
    ) -> "Run":
        build_index(fasta, self.index, model, policy or LengthPolicy(), reuse)
        return self

    def embed(self, precision: str = "float32", threads: int = 0, **settings: object) -> "Run":
        for rank in range(self.world_size):
            embed_shard(self.task(rank, precision=precision, threads=threads, **settings))
        return self

    def task(self, rank: int, **settings: object) -> ShardTask:
        """Return a rank's task: float32 on the CPU, no audit; `settings` are fields of it or of ComputeSettings."""
        of_compute = {name: settings.pop(name) for name in ComputeSettings.__dataclass_fields__ if name in settings}
        compute = ComputeSettings(**{"device": "cpu", "precision": "float32", **of_compute})
        task = ShardTask(self.index, rank, self.world_size, self.shards[rank], self.statuses[rank], compute)
        return replace(task, **{"audit_seconds": 0, **settings})

    def merge(self, dtype: str = "float32") -> "Run":
        folder = self.folder
        merge_shards(
            self.index,
            self.shards,
            self.statuses,
            self.embeddings,
            folder / "records.tsv.gz",
            folder / "manifest.json",
            dtype,
        )
        return self


def results_of(run: Run) -> list[PackResult]:
    """Return the result of each pack, from the only shard of a run."""
    index, none = open_index(run.index), np.empty(0, np.int64)
    shard = open_shard(run.shards[0])
    results = []
    for pack in range(index.num_packs):
        rows = slice(*index.pack_offsets[pack : pack + 2].tolist())
        offsets = shard.residue_offsets[rows.start : rows.stop + 1]
        residues = shard.residues[offsets[0] : offsets[-1]] if len(offsets) else shard.residues
        results.append(PackResult(pack, shard.index_rows[rows], shard.embeddings[rows], none, residues))
    return results


def save_parts(
    folder: Path, index: Index, fingerprint: Fingerprint, results: list[PackResult], name: str, seconds: float = 0
) -> DonePacks:
    """Save results like an unfinished worker, each in its own part, or all in one (math.inf)."""
    done = DonePacks(index)
    with PartWriter(PartStore(folder, index, fingerprint), name, seconds, done) as writer:
        for result in results:
            writer.add(result, "a CPU")
    return done


def run_script(name: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a program of scripts/ as a user would."""
    command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
