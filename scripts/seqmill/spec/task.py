"""A worker's task, and the values that its settings may have. Importing this module does not import torch."""

from dataclasses import dataclass, field
from pathlib import Path

from seqmill.spec.outputs import Outputs

AUTO = "auto"
ATTENTIONS = (AUTO, "avx512", "sdpa", "varlen", "flash_attn_2", "flash_attn_3", "triton")
DEVICES = (AUTO, "cpu", "cuda")
PRECISIONS = (AUTO, "float32", "bfloat16", "float16")
ON_ERROR = ("fail", "skip")


@dataclass(frozen=True)
class ComputeSettings:
    """How embeddings are computed.

    Attributes:
        device: one of `DEVICES`.
        precision: of the matrix products, one of `PRECISIONS`.
        attention: auto, or the name of a kernel (`seqmill.model.attention`).
        threads: CPU threads; 0 leaves the number to torch.
        outputs: the layers to read and how to pool them.
    """

    device: str = AUTO
    precision: str = AUTO
    attention: str = AUTO
    threads: int = 0
    outputs: Outputs = field(default_factory=Outputs)


@dataclass(frozen=True)
class ShardTask:
    """What a worker is asked to do.

    Attributes:
        index: path of `index.h5`.
        rank, world_size: this shard among how many; 0 <= rank < world_size.
        shard, status: paths to write.
        settings: how to compute.
        model: a name or path (`seqmill.spec.models`); empty for the one the index was built for.
        on_error: for a sequence whose embedding is not finite, not even in float32: fail the shard, or skip the
            sequence.
        save_seconds: time between two part files.
        audit_seconds: time limit of the audit, or 1 % of the computation if that is longer; a small shard's audit takes
            hardly longer than its computation. 0 for no audit.
        attempt: 1 for the first; only recorded.
    """

    index: Path
    rank: int
    world_size: int
    shard: Path
    status: Path
    settings: ComputeSettings = field(default_factory=ComputeSettings)
    model: str = ""
    on_error: str = "fail"
    save_seconds: float = 60.0
    audit_seconds: float = 10.0
    attempt: int = 1
