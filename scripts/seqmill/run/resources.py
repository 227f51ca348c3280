"""The memory and time that a job asks a cluster for, from the model's size and the tokens to compute.

The figures are assumptions on the safe side, not measurements. A job that asks for too much waits a little longer;
one that asks for too little is ended and repeated, and goes on from its finished packs.
"""

import functools
import math
from collections.abc import Iterable
from pathlib import Path

import h5py

from seqmill.base.hdf5 import LOCKING
from seqmill.spec.families import Family
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import T5_MODELS, ModelSource
from seqmill.spec.packing import MAX_PACK_TOKENS

# FLOP/s that any device is expected to sustain.
GPU_FLOPS = 20e12
GPU_FLOAT32_FLOPS = 5e12
CPU_THREAD_FLOPS = 20e9
# Snakemake twice, imports, a CUDA context; packs that wait to be saved.
BASE_MB = 6000
BASE_MINUTES = 15
SHARD_MINUTES = 60  # beyond these, on a cluster with `shards: auto`
MOST_SHARDS = 64  # so chosen
MEMORY_GROWTH = 0.5  # of the first request, with each further attempt
INDEX_MB = 8000
INDEX_BYTES_PER_SECOND = 2e6  # on a slow core
VECTOR_BYTES_PER_SECOND = 2e7  # shards larger than memory, read row by row; exports with one file per record
# Activations of a token in float32, in numbers per dimension. Measured: 4 (ESM-2 650M), 8 (ESM C 600M), and 12 to 14
# (ProtT5, see `_activation_dim`; 115 kB per token with PyTorch's attention).
HIDDEN_STATES = 24
CPU_PIECE_TOKENS = 2048  # see seqmill.embedding.runner
GPU_PACKS_IN_FLIGHT = 3  # from the GPU to the disk, with a vector for every residue
FULL_LENGTH = 50_000  # letters assumed for the longest sequence where none is cut
UNKNOWN_DIM = 1280
FOLDER_SHAPES = {shape.family: shape for shape in T5_MODELS.values()}  # a folder's, before it is read
COMPRESSED = (".gz", ".bgz", ".zst")
PROTEIN_COMPRESSION, DNA_COMPRESSION = 3, 4  # of FASTA, at most: a base is two bits
WEIGHTS_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


def index_minutes(fasta: Path, copies: float) -> int:
    """Return the time limit (minutes) for building an index; see `tokens_in` for `copies`."""
    return 60 + math.ceil(_text_bytes(fasta) * copies / INDEX_BYTES_PER_SECOND / 60)


def index_mb(fasta: Path) -> int:
    """Return the memory (MB) for building an index.

    It is half the text's bytes, as a protein's record has 405 and takes 167 (docs/explanation/scaling.md).
    """
    return INDEX_MB + math.ceil(_text_bytes(fasta) / 2e6)


def _text_bytes(fasta: Path) -> int:
    """Return the size of a FASTA file without compression, at most; 0 if it is missing."""
    size = fasta.stat().st_size if fasta.exists() else 0
    return size * DNA_COMPRESSION if fasta.suffix.lower() in COMPRESSED else size


def rewriting_minutes(files: Iterable[Path]) -> int:
    """Return the time limit (minutes) for a merge or an export of files; a missing file counts as empty."""
    size = sum(file.stat().st_size for file in files if file.exists())
    return 60 + math.ceil(size / VECTOR_BYTES_PER_SECOND / 60)


def longest_segment(family: Family, policy: LengthPolicy) -> int:
    """Return about how many tokens go through the model at once."""
    return tokens_of(family, policy.max_length or FULL_LENGTH)


def kept_tokens(family: Family, policy: LengthPolicy, num_layers: int, per_residue: bool, on_gpu: bool) -> int:
    """Return the tokens whose vectors a worker keeps until a sequence is whole, times the layers that are read.

    Proteins need them for windows and for a vector of every residue.
    """
    windows = policy.long_sequences == "window"
    if not family.is_protein or not (windows or per_residue):
        return 0
    longest = FULL_LENGTH if windows else longest_segment(family, policy)
    if per_residue and on_gpu:
        longest = max(longest, GPU_PACKS_IN_FLIGHT * MAX_PACK_TOKENS)
    return longest * num_layers


def memory_mb(model: ModelSource, longest: int, threads: int, attempt: int, kept: int = 0) -> int:
    """Return the memory (MB) for a worker: the weights in float32 twice, as a file and as a model, and activations.

    Args:
        model: the model.
        longest: tokens of the longest segment.
        threads: CPU threads, each of which has a piece of the longest segment or of 2,048 tokens; 0 on a GPU.
        attempt: 1 for the first.
        kept: see `kept_tokens`.
    """
    needed = BASE_MB + 2 * 4 * num_parameters(model) / 1e6
    needed += threads * max(longest, CPU_PIECE_TOKENS) * HIDDEN_STATES * 4 * _activation_dim(model) / 1e6
    needed += max(threads, 1) * 2 * 4 * kept * _hidden_dim(model) / 1e6
    return math.ceil(needed * (1 + MEMORY_GROWTH * (attempt - 1)))


def runtime_minutes(
    model: ModelSource, num_tokens: int, max_tokens: int, precision: str, on_gpu: bool, threads: int, attempt: int
) -> int:
    """Return the time limit (minutes) for a worker that computes `num_tokens` tokens.

    A token costs 2 FLOP per parameter of the layers' matrices, and 4 n w L FLOP of attention in a segment of n tokens,
    for L layers with queries of width w. All segments are assumed to be as long as the longest, `max_tokens`.
    """
    if model.architecture:
        flop_per_token = 2.0 * model.architecture.matrix_parameters
        flop_per_token += 4 * max_tokens * model.architecture.inner_dim * model.architecture.num_layers
    else:
        flop_per_token = 2 * num_parameters(model)
    on_gpu_flops = GPU_FLOAT32_FLOPS if precision == "float32" else GPU_FLOPS
    rate = on_gpu_flops if on_gpu else CPU_THREAD_FLOPS * threads
    return attempt * (BASE_MINUTES + math.ceil(num_tokens * flop_per_token / rate / 60))


def tokens_of(family: Family, letters: int) -> int:
    """Return the tokens of so many residues or bases, special tokens included; for nucleotides an estimate."""
    return -(-letters // family.letters_per_token) + 2


def tokens_in(index: Path, fasta: Path, family: Family, copies: float) -> int:
    """Return the tokens to compute: those of the index, or an estimate from the FASTA's size before it is built.

    A missing FASTA counts as empty. `copies` is how often each letter goes through the model (`LengthPolicy.copies`).
    """
    try:
        state = index.stat()
        return _tokens_of_index(index, state.st_mtime_ns, state.st_size)
    except (OSError, KeyError, ValueError):  # none yet, or damaged: the worker reports that
        return estimated_tokens(fasta, family, copies)


def estimated_tokens(fasta: Path, family: Family, copies: float) -> int:
    """Return an estimate of the tokens to compute from the FASTA's size; see `tokens_in`."""
    letters = fasta.stat().st_size if fasta.exists() else 0
    if fasta.suffix.lower() in COMPRESSED:
        letters *= PROTEIN_COMPRESSION if family.is_protein else DNA_COMPRESSION
    return math.ceil(copies * letters / family.letters_per_token)


@functools.cache
def _tokens_of_index(index: Path, mtime_ns: int, size: int) -> int:  # for every attempt and rule
    with h5py.File(index, "r", locking=LOCKING) as file:
        return int(file.attrs["num_tokens"])


def _hidden_dim(model: ModelSource) -> int:
    return model.architecture.hidden_dim if model.architecture else UNKNOWN_DIM


def _activation_dim(model: ModelSource) -> int:
    """Return the hidden dimension, or half the width of the queries if that is larger (T5)."""
    shape = model.architecture or FOLDER_SHAPES.get(model.family)
    return max(shape.hidden_dim, shape.inner_dim // 2) if shape else UNKNOWN_DIM


def num_parameters(model: ModelSource) -> float:
    """Return the parameters: matrices, embeddings, biases and norms; if unknown, half of the files' bytes (float16)."""
    shape = model.architecture
    if shape is None:
        files = [file for file in model.files if file.suffix in WEIGHTS_SUFFIXES]
        return sum(file.stat().st_size for file in files if file.exists()) / 2
    return shape.num_parameters
