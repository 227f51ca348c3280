"""What a shard's job asks a cluster for: memory and time, from the model's size and the tokens to compute.

The figures are assumptions on the safe side, not measurements: a job that asks for too much waits a little
longer, one that asks for too little is ended and repeated (it goes on from its finished packs). Light:
imports no torch.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import h5py

from seqpack.models.registry import Architecture, ModelSource

# FLOP/s that a device is trusted to keep up, whatever its kind.
GPU_FLOPS = 20e12
GPU_FLOAT32_FLOPS = 5e12
CPU_THREAD_FLOPS = 20e9
# Snakemake twice, imports, a CUDA context; packs that wait to be saved.
BASE_MB = 6000
BASE_MINUTES = 15
MEMORY_GROWTH = 0.5  # of the first request, with each further attempt
COMPRESSED = (".gz", ".bgz", ".zst")
COMPRESSION = 3  # of protein FASTA, at most


def memory_mb(model: ModelSource, attempt: int) -> int:
    """Return the memory (MB) for a worker: the weights in float32 twice, as a file and as a model."""
    needed = BASE_MB + 2 * 4 * _num_parameters(model) / 1e6
    return math.ceil(needed * (1 + MEMORY_GROWTH * (attempt - 1)))


def runtime_minutes(
    model: ModelSource, num_tokens: int, max_tokens: int, precision: str, on_gpu: bool, threads: int, attempt: int
) -> int:
    """Return the time limit (minutes) for a worker that computes `num_tokens` tokens, `attempt` times as long.

    A token costs 2 FLOP a parameter and 4 n d L of attention in a sequence of n tokens, for L layers of
    dimension d; all are taken for as long as the longest, `max_tokens`.
    """
    flop_a_token = 2.0 * _num_parameters(model)
    if model.architecture:
        flop_a_token += 4 * max_tokens * model.architecture.hidden_dim * model.architecture.num_layers
    on_gpu_flops = GPU_FLOAT32_FLOPS if precision == "float32" else GPU_FLOPS
    rate = on_gpu_flops if on_gpu else CPU_THREAD_FLOPS * threads
    return attempt * (BASE_MINUTES + math.ceil(num_tokens * flop_a_token / rate / 60))


def tokens_in(index: Path, fasta: Path) -> int:
    """Return the tokens to compute: those of the index, or before it is built as many as the FASTA has bytes.

    A FASTA that is not there either counts as empty.
    """
    try:
        state = index.stat()
        return _tokens_of_index(index, state.st_mtime_ns, state.st_size)
    except (OSError, KeyError, ValueError):  # none yet, or damaged: its worker will say so
        size = fasta.stat().st_size if fasta.exists() else 0
        return size * COMPRESSION if fasta.suffix.lower() in COMPRESSED else size


@functools.cache
def _tokens_of_index(index: Path, mtime_ns: int, size: int) -> int:  # asked for again with every attempt and rule
    with h5py.File(index, "r") as file:
        return int(file.attrs["num_tokens"])


def _num_parameters(model: ModelSource) -> float:
    """Return the parameters of a known architecture; else half of the bytes in the files, as if in float16."""
    if model.architecture:
        return _parameters(model.architecture)
    if model.kind == "folder" and model.path:
        files = list(model.path.glob("*.safetensors"))
    else:
        files = [model.path] if model.path else []
    return sum(file.stat().st_size for file in files if file.exists()) / 2


def _parameters(architecture: Architecture) -> int:
    """Return the parameters of ESM-2: 12 d^2 a layer, the embedding, and 15 vectors of biases and norms a layer."""
    dim = architecture.hidden_dim
    return architecture.num_layers * (12 * dim**2 + 15 * dim) + architecture.vocabulary * dim
