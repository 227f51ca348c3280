"""The names of a set's shards, as the workflow gives them: `shard_3-of-8.h5`, and what lies beside each."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = r"shard_(?P<rank>\d{1,6})-of-(?P<world_size>[1-9]\d{0,5})"
SHARD = re.compile(rf"{_NAME}\.h5")
# A shard, its status JSON or its lock, which is hidden.
SHARD_FILE = re.compile(rf"\.?{_NAME}\.(?:h5|status\.json|h5\.lock)")


def logs_folder(folder: Path) -> Path:
    return root_of(folder) / "logs" / folder.parent.name / folder.name


def embed_log(shard: Path) -> Path:
    return logs_folder(shard.parent.parent) / f"embed_{shard.stem}.log"


def root_of(folder: Path) -> Path:
    return folder.parent.parent.parent


def status_path_of(shard: Path) -> Path:
    """Return where a shard's status JSON lies unless said otherwise: beside it."""
    return shard.with_suffix(".status.json")


def parts_folder(shard: Path) -> Path:
    """Return where the parts of a shard lie; its sister shards share the folder."""
    return shard.parent / "parts"
