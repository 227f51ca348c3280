"""The names of a set's shards, as the workflow gives them: `shard_3-of-8.h5`, and what lies beside each."""

from __future__ import annotations

import re

_NAME = r"shard_(?P<rank>\d{1,6})-of-(?P<world_size>[1-9]\d{0,5})"
SHARD = re.compile(rf"{_NAME}\.h5")
# A shard, its status JSON or its lock, which is hidden.
SHARD_FILE = re.compile(rf"\.?{_NAME}\.(?:h5|status\.json|h5\.lock)")
