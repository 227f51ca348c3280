"""The status JSON: what a worker says of its shard, written before it ends."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from seqpack.errors import SeqpackError
from seqpack.files import write_json

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
        num_sequences: rows in the shard.
        error: {type, message} when failed.
        fingerprint: `Fingerprint.attributes()`, once known.
        run: device, device_uuid, attention, precision, threads, torch, num_tokens, num_residues, num_packs,
            tokens_per_second (over the compute stage), pack_fill, peak_host_bytes, peak_device_bytes.
        seconds: wall time by stage.
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
    num_sequences: int = 0
    error: dict[str, str] | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    shard_sha256: str = ""
    shard_bytes: int = 0
    warning: str = ""


def write_status(path: Path, status: ShardStatus) -> None:
    """Write the status JSON, whole or not at all."""
    write_json(path, asdict(status))


def read_status(path: Path) -> ShardStatus:
    """Read a status JSON.

    Raises:
        SeqpackError: absent, not JSON, or without the fields of a status.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return ShardStatus(**content)
    except FileNotFoundError:
        raise SeqpackError(f"{path}: no such status JSON; the shard's worker has not run") from None
    except OSError as error:
        raise SeqpackError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise SeqpackError(f"{path}: not a seqpack status JSON: {error}") from error
