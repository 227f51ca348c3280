"""What a worker is asked to do. Light: imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from seqmill.spec.outputs import Outputs

ON_ERROR = ("fail", "skip")


@dataclass(frozen=True)
class ShardTask:
    """What a worker is asked to do.

    Attributes:
        index: path of `index.h5`.
        model: a name or path (`seqmill.spec.models`); empty for the one the index was built for.
        rank, world_size: this shard among how many; 0 <= rank < world_size.
        shard, status: paths to write.
        device: auto, cpu or cuda.
        precision: auto, float32, bfloat16 or float16.
        attention: auto, or a kernel's name (`seqmill.model.attention`).
        threads: CPU threads for the matrix products; 0 leaves it to torch.
        outputs: which layers are read, and how they are pooled.
        on_error: what becomes of a sequence whose embedding is not finite, in float32 either: fail the
            shard, or skip the sequence.
        save_seconds: between two part files.
        audit_seconds: the audit may take this long, or 1 % of the computation if that is longer, but hardly
            longer than the computation; 0 for none.
        attempt: 1 for the first; recorded only.
    """

    index: Path
    rank: int
    world_size: int
    shard: Path
    status: Path
    model: str = ""
    device: str = "auto"
    precision: str = "auto"
    attention: str = "auto"
    threads: int = 0
    outputs: Outputs = field(default_factory=Outputs)
    on_error: str = "fail"
    save_seconds: float = 60.0
    audit_seconds: float = 10.0
    attempt: int = 1


AUTO = "auto"
ATTENTIONS = (AUTO, "avx512", "sdpa", "varlen", "flash_attn_2", "flash_attn_3", "triton")

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """How shards will be computed, as in `seqmill.spec.task.ShardTask`."""

    device: str = "auto"
    precision: str = "auto"
    attention: str = AUTO
    threads: int = 0
    outputs: Outputs = field(default_factory=Outputs)
