"""A worker's task, and the values that its settings may have. Importing this module does not import torch."""

from dataclasses import dataclass, field
from pathlib import Path

from seqmill.spec.outputs import Outputs

AUTO = "auto"
ATTENTIONS = (
    AUTO,
    *("amx", "avx512_bf16", "avx512", "avx2", "neon"),  # our own, on a CPU
    *("sdpa", "varlen", "flash_attn_2", "flash_attn_3", "triton"),
)
DEVICES = (AUTO, "cpu", "cuda")
PRECISIONS = (AUTO, "float32", "bfloat16", "float16", "float8")
ON_ERROR = ("fail", "skip")
ON_INVALID = ("fail", "skip")


@dataclass(frozen=True)
class ComputeSettings:
    """How embeddings are computed."""

    device: str = AUTO  # one of `DEVICES`
    precision: str = AUTO  # of the matrix products, one of `PRECISIONS`
    attention: str = AUTO  # auto, or the name of a kernel (`seqmill.model.attention`)
    threads: int = 0  # CPU threads; 0 leaves the number to torch
    outputs: Outputs = field(default_factory=Outputs)


@dataclass(frozen=True)
class ShardTask:
    """What a worker is asked to do."""

    index: Path  # of `index.h5`
    rank: int  # this shard's number, 0 <= rank < world_size
    world_size: int  # number of shards
    shard: Path  # to write
    status: Path  # the status JSON to write
    settings: ComputeSettings = field(default_factory=ComputeSettings)
    model: str = ""  # a name or path (`seqmill.spec.models`); empty for the one the index was built for
    on_error: str = "fail"  # or skip: what to do with a sequence whose embedding is not finite, not even in float32
    save_seconds: float = 60.0  # between two part files
    # Time limit of the audit, or 1 % of the computation if that is longer; a small shard's audit takes hardly longer
    # than its computation. 0 for no audit.
    audit_seconds: float = 10.0
    attempt: int = 1  # only recorded
