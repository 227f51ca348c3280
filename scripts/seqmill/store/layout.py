"""Where every file of a run is: the one place that knows the names in a results folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_NAME = r"shard_(?P<rank>\d{1,6})-of-(?P<world_size>[1-9]\d{0,5})"
SHARD = re.compile(rf"{_NAME}\.h5")
# A shard, its status JSON or its hidden lock.
SHARD_FILE = re.compile(rf"\.?{_NAME}\.(?:h5|status\.json|h5\.lock)")


@dataclass(frozen=True)
class RunFolder:
    """The files of one dataset and model: `results/DATASET/MODEL`, and its logs.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def name(self) -> str:
        """DATASET/MODEL."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def index(self) -> Path:
        return self.path / "index.h5"

    @property
    def embeddings(self) -> Path:
        return self.path / "embeddings.h5"

    @property
    def records(self) -> Path:
        return self.path / "records.tsv.gz"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def exports(self) -> Path:
        """The folder of the exports."""
        return self.path / "exports"

    @property
    def merged(self) -> list[Path]:
        """What the merge writes."""
        return [self.embeddings, self.records, self.manifest]

    @property
    def shards(self) -> Path:
        """The folder of the shards."""
        return self.path / "shards"

    @property
    def parts(self) -> Path:
        """The folder of the parts, which all shards share."""
        return self.shards / "parts"

    def shard(self, rank: int, world_size: int) -> Path:
        return self.shards / f"shard_{rank}-of-{world_size}.h5"

    def all_shards(self, world_size: int) -> list[Path]:
        """Return the paths of a whole set of shards, by rank."""
        return [self.shard(rank, world_size) for rank in range(world_size)]

    @property
    def root(self) -> Path:
        """The working directory of the run, which holds `results`, `logs` and `.snakemake`."""
        return self.path.parent.parent.parent

    @property
    def logs(self) -> Path:
        return self.root / "logs" / self.path.parent.name / self.path.name

    @property
    def index_log(self) -> Path:
        return self.logs / "build_index.log"

    @property
    def merge_log(self) -> Path:
        return self.logs / "merge_shards.log"

    def shard_log(self, shard: Path) -> Path:
        return self.logs / f"embed_{shard.stem}.log"


def status_path_of(shard: Path) -> Path:
    """Return the path of a shard's status JSON, beside the shard."""
    return shard.with_suffix(".status.json")


def parts_folder(shard: Path) -> Path:
    """Return the folder of a shard's parts, which all shards of the folder share."""
    return shard.parent / "parts"
