"""Where every file of a run is: the only module that knows the names in a results folder."""

import re
from dataclasses import dataclass
from pathlib import Path

_NAME = r"shard_(?P<rank>\d{1,6})-of-(?P<world_size>[1-9]\d{0,5})"
SHARD = re.compile(rf"{_NAME}\.h5")
# A shard, its status JSON or its hidden lock.
SHARD_FILE = re.compile(rf"\.?{_NAME}\.(?:h5|status\.json|h5\.lock)")


def _file(name: str, folder: str = "path") -> property:
    return property(lambda run: getattr(run, folder) / name)


@dataclass(frozen=True)
class RunFolder:
    """The files of one dataset and model, `results/DATASET/MODEL`, and its logs. Every attribute is a `Path`."""

    path: Path
    logs_root: Path | None = None  # None: `logs` next to the folder of all results

    index = _file("index.h5")
    embeddings = _file("embeddings.h5")
    records = _file("records.tsv.gz")
    manifest = _file("manifest.json")
    report = _file("report.html")
    exports = _file("exports")
    shards = _file("shards")
    parts = _file("parts", "shards")  # all shards share it
    index_log = _file("build_index.log", "logs")
    merge_log = _file("merge_shards.log", "logs")

    @property
    def name(self) -> str:
        """DATASET/MODEL."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def logs(self) -> Path:
        return (self.logs_root or self.path.parent.parent.parent / "logs") / self.name

    @property
    def merged(self) -> list[Path]:
        """The files that the merge writes."""
        return [self.embeddings, self.records, self.manifest]

    def shard(self, rank: int, world_size: int) -> Path:
        return self.shards / f"shard_{rank}-of-{world_size}.h5"

    def all_shards(self, world_size: int) -> list[Path]:
        """Return the paths of a complete set of shards, by rank."""
        return [self.shard(rank, world_size) for rank in range(world_size)]

    def shard_log(self, shard: Path) -> Path:
        return self.logs / f"embed_{shard.stem}.log"


def status_path_of(shard: Path) -> Path:
    """Return the path of a shard's status JSON, in the same folder."""
    return shard.with_suffix(".status.json")


def shard_path_of(status: Path) -> Path:
    """Return the path of the shard that a status JSON belongs to."""
    return status.with_name(status.name.removesuffix(".status.json") + ".h5")


def parts_folder(shard: Path) -> Path:
    """Return the folder of a shard's parts, which all shards in its folder share."""
    return shard.parent / "parts"


def fetch_log(root: Path, model: str) -> Path:
    """Return the log of the job that fetches a released model's weights; `root` is the run's working directory."""
    return root / "logs" / "fetch_weights" / f"{model}.log"
