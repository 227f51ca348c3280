"""The status JSON: what a worker says of its shard, written before it ends."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from seqmill.base.files import write_json
from seqmill.errors import SeqmillError

SHOWN_ERROR = 300  # characters
RUNNING, COMPLETE, FAILED = "running", "complete", "failed"


@dataclass
class ShardStatus:
    """The state of one shard.

    Attributes:
        rank, world_size: which shard of how many.
        status: running, complete or failed.
        shard_path: where the shard is or will be.
        attempt: 1 for the first.
        started, ended: ISO 8601 with time zone; `ended` is empty while running.
        num_sequences: the rank's sequences, quarantined ones included.
        num_packs, done_packs, resumed_packs: the rank's packs; how many are done, as of `updated`; how many of
            these an earlier attempt had done.
        updated: when the worker last wrote this, ISO 8601.
        error: {type, message} when failed.
        fingerprint: `Fingerprint.attributes()`, once known.
        weights: the files of the model, `seqmill.base.input_files.InputFile`; none of untrained ones.
        run: precision_asked (as set), num_layers (of the model), device, device_uuid, attention, elementwise,
            computed_by (of resumed packs as well), precision, threads, torch, num_tokens, num_residues, done_tokens
            (of done packs, resumed ones included, as of `updated`), throughput (points of `seqmill.store.status`),
            pack_fill, tokens_per_second (of the packs computed now, over the compute stage), model_flops_per_second,
            out_of_memory_splits, sequences_on_cpu, recomputed_float32 (sequences), peak_host_bytes, and on a GPU
            peak_device_bytes, model_flop_utilization (of a matrix product's speed on this device),
            gpu_utilization_mean, gpu_memory_bytes_max, gpu_power_watts_mean.
        seconds: wall time by stage.
        quarantined: sequences without a finite embedding: how many, and the first of them by name.
        audit: a few embeddings against the reference: `seqmill.embed.audit.Audit`, and the verdict.
        shard_sha256, shard_bytes: of the finished file.
        warning: said of embeddings that mean nothing.
    """

    rank: int
    world_size: int
    status: str
    shard_path: str
    attempt: int = 1
    started: str = ""
    ended: str = ""
    updated: str = ""
    num_sequences: int = 0
    num_packs: int = 0
    done_packs: int = 0
    resumed_packs: int = 0
    error: dict[str, str] | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    weights: list[dict[str, Any]] | None = None
    run: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    quarantined: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    shard_sha256: str = ""
    shard_bytes: int = 0
    warning: str = ""


@contextmanager
def stage(status: ShardStatus, name: str) -> Iterator[None]:
    """Note the wall time of the block, in seconds, as the stage `name`."""
    start = time.perf_counter()
    yield
    status.seconds[name] = round(time.perf_counter() - start, 3)


def write_status(path: Path, status: ShardStatus) -> None:
    """Write the status JSON, whole or not at all."""
    status.updated = datetime.now().astimezone().isoformat(timespec="seconds")
    write_json(path, asdict(status))


def read_status(path: Path) -> ShardStatus:
    """Read a status JSON.

    Raises:
        SeqmillError: absent, not JSON, or without the fields of a status.
    """
    try:
        text = path.read_text(encoding="utf-8")
        status = ShardStatus(**json.loads(text))
        wrong = _wrong_fields(status)
        # HDF5 takes no NUL, and a lone surrogate can't be encoded (which raises a ValueError here).
        if b"\\u0000" in json.dumps(asdict(status), ensure_ascii=False).encode():
            raise ValueError("it holds a NUL")
    except FileNotFoundError:
        raise SeqmillError(f"{path}: no such status JSON; the shard's worker has not run") from None
    except OSError as error:
        raise SeqmillError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise SeqmillError(f"{path}: not a seqmill status JSON: {str(error)[:SHOWN_ERROR]}") from error
    if wrong:
        raise SeqmillError(f"{path}: not a seqmill status JSON: {', '.join(wrong)} can't be so")
    return status


def _wrong_fields(status: ShardStatus) -> list[str]:
    """Return the names of the fields whose values can't be theirs."""
    wrong = []
    for name, kinds in _kinds().items():
        value = getattr(status, name)
        if not isinstance(value, kinds) or isinstance(value, bool):
            wrong.append(name)
    return wrong if status.status in (RUNNING, COMPLETE, FAILED) else [*wrong, "status"]


@functools.cache
def _kinds() -> dict[str, tuple[type, ...]]:
    """Return the types that each field may have."""
    hints = get_type_hints(ShardStatus).items()
    each = {name: get_args(hint) if isinstance(hint, UnionType) else (hint,) for name, hint in hints}
    return {name: tuple(get_origin(kind) or kind for kind in kinds) for name, kinds in each.items()}


MOST_POINTS = 120


class Throughput:
    """Takes a point as often as packs are done, and keeps few of them, about evenly spaced.

    Attributes:
        points: [seconds since the beginning, tokens computed by then], both increasing, the first [0, 0]; changed in
            place, so that a status that holds them is up to date.
    """

    def __init__(self) -> None:
        self.points: list[list[float]] = [[0.0, 0]]
        self._interval = 0.0

    def add(self, seconds: float, num_tokens: int, is_last: bool = False) -> None:
        """Take a point, unless it comes too soon after the one before; the last is always taken."""
        if seconds - self.points[-1][0] < self._interval and not is_last:
            return
        self.points.append([round(seconds, 2), num_tokens])
        if len(self.points) > MOST_POINTS:
            del self.points[1::2]
            self._interval = seconds / len(self.points)
