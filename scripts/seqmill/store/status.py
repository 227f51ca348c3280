"""The status JSON: what a worker reports about its shard, written before it exits."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from seqmill.base.files import write_json
from seqmill.errors import SeqmillError

SHOWN_ERROR = 300  # characters
RUNNING: Final = "running"
COMPLETE: Final = "complete"
FAILED: Final = "failed"
MOST_POINTS = 120

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Measure = Annotated[float, msgspec.Meta(ge=0)]


class StatusError(msgspec.Struct):
    """The exception that ended a worker."""

    type: str
    message: str


class RunFacts(msgspec.Struct, omit_defaults=True):
    """How a worker computes its shard. A fact that is not known yet is None here and absent from the JSON."""

    device: str | None = None
    device_uuid: str | None = None  # empty for a CPU
    precision: str | None = None
    precision_asked: str | None = None  # the setting, which may be auto
    threads: Count | None = None
    torch: str | None = None
    num_tokens: Count | None = None
    num_residues: Count | None = None
    pack_fill: Measure | None = None  # tokens divided by the capacity of the packs
    num_layers: Count | None = None  # of the model
    attention: str | None = None
    elementwise: str | None = None
    throughput: list[tuple[Measure, Count]] | None = None  # the points of `Throughput`
    done_tokens: Count | None = None  # of all packs that were done when this was written, resumed ones included
    tokens_per_second: Measure | None = None  # of the packs that this attempt computed, over the compute stage
    out_of_memory_splits: Count | None = None
    sequences_on_cpu: Count | None = None
    recomputed_float32: Count | None = None  # sequences
    gpu_utilization_mean: Measure | None = None  # by NVML, as are the next three
    gpu_memory_bytes_max: Count | None = None
    gpu_power_watts_mean: Measure | None = None
    gpu_samples: Count | None = None
    model_flops_per_second: Count | None = None  # likewise
    model_flop_utilization: Measure | None = None  # divided by the speed of a matrix product on this device
    computed_by: list[str] | None = None  # the kinds of device and kernels, also those of resumed packs
    peak_host_bytes: Count | None = None
    peak_device_bytes: Count | None = None

    def update(self, **facts: object) -> None:
        for name, value in facts.items():
            setattr(self, name, value)


class AuditFacts(msgspec.Struct, omit_defaults=True):
    """How far stored embeddings are from the audit's reference, and the verdict; all None if the audit is off."""

    sequences: Count | None = None  # recomputed
    worst_cosine: float | None = None  # between stored and reference; None in the JSON if it is not finite
    worst_relative_error: float | None = None  # |stored - reference| / |reference| (L2); likewise
    worst_sequence: str | None = None  # id of the sequence with the highest relative error
    reference: str | None = None  # its name, or why nothing was recomputed
    seconds: Measure | None = None  # including the time to load the reference
    longest_included: bool | None = None  # whether a sequence of the greatest length was recomputed
    verdict: Literal["ok", "warn", "fail", "none"] | None = None

    @property
    def worst(self) -> str:
        """The worst errors, in words."""
        errors = f"worst cosine {self.worst_cosine}, worst relative error {self.worst_relative_error}"
        return f"{errors} against {self.reference}"


class Quarantined(msgspec.Struct, omit_defaults=True):
    """How many sequences have no finite embedding, and the names of the first of them."""

    num_sequences: Count = 0
    first: list[str] = []


class ShardStatus(msgspec.Struct, forbid_unknown_fields=True):
    """The state of one shard. Times are ISO 8601 with time zone."""

    rank: int
    world_size: int
    status: Literal["running", "complete", "failed"]
    shard_path: str  # the final one
    attempt: Count = 1
    started: str = ""
    ended: str = ""  # empty while the worker runs
    updated: str = ""  # when this was written
    num_sequences: Count = 0  # of the rank, including quarantined ones
    num_packs: Count = 0  # of the rank
    done_packs: Count = 0
    resumed_packs: Count = 0  # of the done ones, those that earlier attempts did
    error: StatusError | None = None
    fingerprint: dict[str, Any] = {}  # `Fingerprint.attributes()`, once it is known
    weights: list[dict[str, Any]] | None = None  # the model's files, each an `InputFile`; empty for untrained weights
    run: RunFacts = msgspec.field(default_factory=RunFacts)
    seconds: dict[str, Measure] = {}  # wall time by stage
    quarantined: Quarantined = msgspec.field(default_factory=Quarantined)
    audit: AuditFacts = msgspec.field(default_factory=AuditFacts)
    shard_sha256: str = ""
    shard_bytes: Count = 0
    warning: str = ""  # about embeddings that have no meaning

    @property
    def reason(self) -> str:
        """Why the worker failed, in words."""
        return f"{self.error.type}: {self.error.message}" if self.error else "its worker ended without giving a reason"


# Made at import: msgspec crashes if several threads are the first to decode a type.
DECODER = msgspec.json.Decoder(ShardStatus)


@contextmanager
def stage(status: ShardStatus, name: str) -> Iterator[None]:
    """Record the wall time of the block, in seconds, as the stage `name`."""
    start = time.perf_counter()
    yield
    status.seconds[name] = round(time.perf_counter() - start, 3)


def write_status(path: Path, status: ShardStatus) -> None:
    """Write the status JSON atomically."""
    status.updated = datetime.now().astimezone().isoformat(timespec="seconds")
    write_json(path, msgspec.to_builtins(status))


def read_status(path: Path) -> ShardStatus:
    """Read a status JSON; raise a SeqmillError if the file is missing, or a field is missing, wrong or unknown."""
    try:
        data = path.read_bytes()
        if b"\\u0000" in data:  # HDF5 takes no NUL
            raise ValueError("it contains a NUL")
        return DECODER.decode(data)
    except FileNotFoundError:
        raise SeqmillError(f"{path}: no such status JSON; the shard's worker has not run") from None
    except OSError as error:
        raise SeqmillError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SeqmillError(f"{path}: not a seqmill status JSON: {str(error)[:SHOWN_ERROR]}") from error


class Throughput:
    """Records how many tokens are computed over time, as a bounded number of roughly evenly spaced points."""

    def __init__(self) -> None:
        # Seconds since the start, tokens computed by then; both increase. The list is changed in place, so a status
        # that holds it is up to date.
        self.points: list[tuple[float, int]] = [(0.0, 0)]
        self._interval = 0.0

    def add(self, seconds: float, num_tokens: int, is_last: bool = False) -> None:
        """Add a point, unless it follows the last one too soon; the final point is always added."""
        if seconds - self.points[-1][0] < self._interval and not is_last:
            return
        self.points.append((round(seconds, 2), num_tokens))
        if len(self.points) > MOST_POINTS:
            del self.points[1::2]
            self._interval = seconds / len(self.points)
