"""The audit: a few of a shard's sequences computed again, in another way, against what is stored.

The reference is fair-esm 2.0.0 (Lin et al. 2023, doi:10.1126/science.ade2574) in float32 on the CPU, one
sequence at a time, without padding or packs: none of our forward, kernels, packs or order. What it does
share is the reading of the index and of the weights.
"""

from __future__ import annotations

import logging
import math
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from seqpack.index import Index
from seqpack.models.esm2 import ESM2, ROPE_BASE, parameter_shapes
from seqpack.models.registry import Architecture, ModelSource
from seqpack.models.weights import FAIR_ESM, open_weights, untrained_tensors
from seqpack.packs import Pack
from seqpack.pooling import mean_over_residues

MOST_SEQUENCES = 8
SHORT_TOKENS = 64  # enough for the time to be that of the matrix products
# What loading is expected to take, of float32: seeded weights are made at about the first; a file has just been read
# by the worker and comes from memory.
MADE_BYTES_PER_SECOND, READ_BYTES_PER_SECOND = 0.5e9, 1.5e9
MEMORY_FACTOR = 1.3  # of the weights alone
# fair-esm keeps the scores and the probabilities of all heads, and averages them.
ATTENTION_BYTES = 12  # per head and pair of tokens
# What those passes over memory cost, per head and pair, in operations of the matrix products: with it the time
# predicted from 64 tokens was within 1.4 times of that measured for 256 to 4096 (8M and 650M, two cores).
ATTENTION_OPERATIONS = 400

# What an audit is judged by. float32 stays within 5e-5 of fair-esm, and 1e-2 is no rounding error; bfloat16 stays
# above a cosine of 0.9999 (both on seeded weights, docs/accuracy.md). Rotary tables made in bfloat16 gave 0.9973,
# swapped rows 0.991 (tests/unit/test_audit.py). The errors for 16 bits are what the cosines are for vectors of one
# length, rounded up: so that a wrong length is seen as well.
LEAST_COSINE = {"fail": 0.99, "warn": 0.999}
MOST_ERROR = {"fail": 1e-2, "warn": 1e-4}
MOST_ERROR_16_BITS = {"fail": 0.15, "warn": 0.05}

log = logging.getLogger(__name__)

Parts = dict[str, list[torch.Tensor]]
Embed = Callable[[torch.Tensor], torch.Tensor]  # int64 (num_tokens,) to float32 (hidden_dim,)


@dataclass(frozen=True)
class Audit:
    """How far stored embeddings are from the reference.

    Attributes:
        sequences: how many were recomputed.
        worst_cosine: the lowest between a stored embedding and its reference; nan when none was recomputed,
            or when a stored one is zero or not finite.
        worst_relative_error: the highest |stored - reference| / |reference| (L2); nan likewise.
        worst_sequence: id of the sequence with the highest relative error.
        reference: what the embeddings were compared with, or why nothing was recomputed.
        seconds: the audit's own time, loading the reference included.
        longest_included: whether a sequence as long as the longest was recomputed.
    """

    sequences: int
    worst_cosine: float
    worst_relative_error: float
    worst_sequence: str
    reference: str
    seconds: float
    longest_included: bool


def audit_embeddings(
    index: Index, rows: np.ndarray, embedding_of: Callable[[int], np.ndarray], source: ModelSource, seconds: float
) -> Audit:
    """Recompute a short sequence, the longest and random others, as many as time allows, up to MOST_SEQUENCES.

    Which ones are tried, and in which order, depends on the index and the rows alone.

    Args:
        index: holds the tokens.
        rows: int64, index rows with a stored embedding, in any order.
        embedding_of: gives the stored embedding of a row, float32 (hidden_dim,).
        source: the model whose weights the embeddings were computed with.
        seconds: the most time the audit should take; after the first sequence, what is expected to exceed
            it is not begun.

    Raises:
        SeqpackError: the weights can't be read.
    """
    start = time.perf_counter()

    def elapsed() -> float:
        return time.perf_counter() - start

    def nothing(why: str) -> Audit:
        return Audit(0, math.nan, math.nan, "", f"none: {why}", elapsed(), False)

    if not len(rows):
        return nothing("there are no sequences")
    if source.kind == "untrained":
        assert source.architecture is not None
        architecture, parts = source.architecture, None
    else:
        architecture, parts = open_weights(source)
    num_bytes = 4 * sum(math.prod(shape) for shape in parameter_shapes(architecture).values())
    load_seconds = num_bytes / (MADE_BYTES_PER_SECOND if parts is None else READ_BYTES_PER_SECOND)
    free = available_memory()
    if load_seconds > seconds:
        return nothing(f"loading the weights may take {load_seconds:.0f} s, and {seconds:g} s are allowed")
    if num_bytes * MEMORY_FACTOR > free:
        return nothing(f"it needs {num_bytes * MEMORY_FACTOR / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free")

    rows = np.sort(rows)
    lengths = index.token_offsets[rows + 1] - index.token_offsets[rows]
    longest = int(lengths.max())
    with torch.inference_mode():
        if parts is None:
            parts = {name: [tensor] for name, tensor in untrained_tensors(architecture).items()}
        reference, embed = _reference(architecture, parts, longest)
        probe, rate = _tokens(index, int(rows[lengths.argmax()]))[:SHORT_TOKENS], math.inf
        for _ in range(2):  # the first run also reads weights that are memory maps
            if elapsed() < seconds:
                rate = _timed(embed, probe)[1] / _operations(architecture, len(probe))
        found: dict[int, tuple[float, float, int]] = {}
        for position in _candidates(index, rows, lengths):
            row, length = int(rows[position]), int(lengths[position])
            # The first is computed in any case: a busy machine must not leave a shard without an audit.
            in_time = not found or elapsed() + rate * _operations(architecture, length) <= seconds
            in_memory = ATTENTION_BYTES * architecture.num_heads * length**2 <= available_memory()
            if row in found or not (in_time and in_memory):
                continue
            expected, took = _timed(embed, _tokens(index, row))
            rate = took / _operations(architecture, length)
            found[row] = (*_compare(embedding_of(row), expected.numpy()), length)
    if not found:
        return nothing("the memory suffices for not one sequence")
    cosines, errors, done_lengths = (np.array(column) for column in zip(*found.values(), strict=True))
    return Audit(
        sequences=len(found),
        worst_cosine=float(cosines.min()),  # min, max and argmax give nan where there is one
        worst_relative_error=float(errors.max()),
        worst_sequence=index.sequence_id(list(found)[errors.argmax()]),
        reference=reference,
        seconds=elapsed(),
        longest_included=bool(done_lengths.max() == longest),
    )


def judge(audit: Audit, precision: str) -> tuple[str, str]:
    """Return "ok", "warn", "fail" or "none" for embeddings computed in `precision`, and a sentence that says why."""
    if not audit.sequences:
        return "none", f"not audited: {audit.reference.removeprefix('none: ')}"
    message = (
        f"{audit.sequences} sequences recomputed ({audit.reference}): worst cosine {audit.worst_cosine:.6f}, "
        f"worst relative error {audit.worst_relative_error:.1e} at {audit.worst_sequence!r}"
    )
    most_error = MOST_ERROR_16_BITS if precision in ("bfloat16", "float16") else MOST_ERROR
    for verdict, remedy in (
        ("fail", "do not use these embeddings; compute them in another precision or on another device"),
        ("warn", "they are less exact than they should be"),
    ):
        cosine, error = LEAST_COSINE[verdict], most_error[verdict]
        if not (audit.worst_cosine >= cosine and audit.worst_relative_error <= error):  # so that nan fails
            return verdict, f"{message}; in {precision} at least {cosine} and at most {error:g} are wanted: {remedy}"
    return "ok", message


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes this process can still take: what the machine has free, or its cgroups leave, if less.

    A cgroup's inactive file pages count as free. Without Linux's files the answer is sys.maxsize.
    """
    limits = [sys.maxsize]
    with suppress(OSError):
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                root = cgroups / "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            folder = root / path.lstrip("/")
            levels = [folder, *folder.parents]
            for level in levels[: levels.index(root) + 1]:
                limits.extend(_left_in_cgroup(level, *names))
    return min(limits)


def _left_in_cgroup(folder: Path, limit: str, usage: str, inactive: str) -> list[int]:
    try:
        most, used = ((folder / name).read_text().strip() for name in (limit, usage))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # no such level: a container sees the path of its host
        return []
    return [] if most == "max" else [int(most) - int(used) + int(statistics.get(inactive, 0))]


def _candidates(index: Index, rows: np.ndarray, lengths: np.ndarray) -> list[int]:
    """Return places in `rows`: a short sequence, a longest, random others; the longest again, its time better known."""
    generator = np.random.default_rng([int(index.digest[:16], 16), zlib.crc32(rows)])
    off = np.abs(lengths - SHORT_TOKENS)
    short, longest = (generator.choice(np.flatnonzero(kind)) for kind in (off == off.min(), lengths == lengths.max()))
    others = generator.choice(len(rows), min(len(rows), MOST_SEQUENCES), replace=False)
    places = [*dict.fromkeys((short, longest, *others))][:MOST_SEQUENCES]
    return [*places, longest]


def _tokens(index: Index, row: int) -> torch.Tensor:
    tokens = index.tokens[index.token_offsets[row] : index.token_offsets[row + 1]]
    return torch.from_numpy(tokens.astype(np.int64))


def _operations(architecture: Architecture, num_tokens: int) -> float:
    """Return what a sequence costs in a layer: the matrix products, and the passes over the attention scores."""
    d, heads = architecture.hidden_dim, architecture.num_heads
    return 24 * d**2 * num_tokens + (4 * d + ATTENTION_OPERATIONS * heads) * num_tokens**2


def _timed(embed: Embed, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    return embed(tokens), time.perf_counter() - start


def _compare(stored: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return the cosine and the relative error, computed in float64."""
    a, b = stored.astype(np.float64), reference.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):  # nan says it
        cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        return float(cosine), float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _reference(architecture: Architecture, parts: Parts, max_tokens: int) -> tuple[str, Embed]:
    """Return the reference's name and itself: fair-esm, or our own forward where fair-esm can't be imported."""
    try:
        import esm

        _ = esm.ESM2  # another package of this name has none
    except Exception as error:  # it is optional, so that however it is broken the shard is not lost
        log.info("the audit does without fair-esm: %s: %s", type(error).__name__, error)
        return "seqpack float32, one sequence at a time", _our_own(architecture, parts, max_tokens)
    return f"fair-esm {esm.__version__} float32", _fair_esm(architecture, parts)


def _fair_esm(architecture: Architecture, parts: Parts) -> Embed:
    import esm

    num_layers = architecture.num_layers
    with torch.device("meta"):  # neither memory nor time for values that are replaced at once
        d, heads = architecture.hidden_dim, architecture.num_heads
        model = esm.ESM2(num_layers, d, heads, token_dropout=architecture.token_dropout)
    model.lm_head = torch.nn.Identity()  # these two are not part of our weights
    model.contact_head = torch.nn.Identity()
    model.load_state_dict(_fair_esm_state(architecture, parts), strict=True, assign=True)
    model.eval()

    def embed(tokens: torch.Tensor) -> torch.Tensor:
        hidden = model(tokens[None], repr_layers=[num_layers])["representations"][num_layers]
        return hidden[0, 1:-1].mean(dim=0)

    return embed


def _fair_esm_state(architecture: Architecture, parts: Parts) -> dict[str, torch.Tensor]:
    """Return the tensors by fair-esm's names; the inverse of `seqpack.models.weights.canonical_parts`."""
    head_dim = architecture.head_dim
    # As esm/rotary_embedding.py computes it.
    inv_freq = 1.0 / (ROPE_BASE ** (torch.arange(0, head_dim, 2).float() / head_dim))
    state = {f"{FAIR_ESM.layer.format(n)}self_attn.rot_emb.inv_freq": inv_freq for n in range(architecture.num_layers)}
    for canonical, tensors in parts.items():
        stem, _, kind = canonical.rpartition(".")
        if stem.startswith("layers."):
            _, layer, part = stem.split(".")
            names = [FAIR_ESM.layer.format(layer) + name for name in FAIR_ESM.parts[part]]
        else:
            names = [{"embed": FAIR_ESM.embed, "final_norm": FAIR_ESM.final_norm}[stem]]
        pieces = tensors if len(tensors) == len(names) else tensors[0].chunk(len(names))
        state.update({f"{name}.{kind}": piece.float() for name, piece in zip(names, pieces, strict=True)})
    return state


def _our_own(architecture: Architecture, parts: Parts, max_tokens: int) -> Embed:
    tensors = {name: torch.cat(part) if len(part) > 1 else part[0] for name, part in parts.items()}
    model = ESM2(architecture, tensors, torch.float32, max_tokens, "sdpa")

    def embed(tokens: torch.Tensor) -> torch.Tensor:
        pack = Pack.from_tokens(tokens.numpy(), np.array([len(tokens)], np.int64))
        return mean_over_residues(model(pack), pack)[0]

    return embed
