"""The audit: a few of a shard's sequences computed again, in another way, against what is stored.

The reference (`audit_references`) is another forward, in float32 on the CPU, one segment at a time. Pooling and the
mean over a sequence's segments are written out here once more: none of our forward, kernels, packs, order or
pooling is used. What the audit does share is the reading of the index and of the weights.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from seqmill.base.machine import available_memory
from seqmill.embed.audit_references import make_reference, memory, operations
from seqmill.model.weights import open_weights, parameter_shapes, untrained_tensors
from seqmill.spec.models import DNABERT_S, ESM2, ModelSource
from seqmill.spec.outputs import Outputs
from seqmill.store.index import Index

MOST_SEQUENCES = 8
# The first sequence may take so long whatever is allowed: a busy machine must not leave a shard without an audit, nor
# one contig of a million bases hold it up for hours.
FIRST_SECONDS = 60.0
SHORT_TOKENS = 64  # enough for the time to be that of the matrix products
# What loading is expected to take, of float32: seeded weights are made at about the first; a file has just been read
# by the worker and comes from memory.
MADE_BYTES_PER_SECOND, READ_BYTES_PER_SECOND = 0.5e9, 1.5e9
# fair-esm holds length x length scores of all heads. What needs more than this is left out, however much is free, so
# that a job's memory is not decided by its audit: 2,886 tokens of 20 heads, 2,041 of 40.
MOST_BYTES = 2e9
MEMORY_FACTOR = 1.3  # of the weights alone

# The tokens whose hidden states are averaged; as `seqmill.embed.pooling` says.
POOLED = {
    (ESM2, "mean"): slice(1, -1),
    (ESM2, "mean_tokens"): slice(1, -1),
    (ESM2, "cls"): slice(0, 1),
    (DNABERT_S, "mean"): slice(None),
    (DNABERT_S, "mean_tokens"): slice(1, -1),
    (DNABERT_S, "cls"): slice(0, 1),
    **{(family, pooling): slice(1, -1) for family in (ESM2, DNABERT_S) for pooling in ("max", "std")},
}

# What an audit is judged by, the least cosine and the most relative error. float32 stays within 5e-5 of the reference,
# and 1e-2 is no rounding error. The errors for 16 bits are what the cosines are for vectors of one length, rounded
# up: so that a wrong length is seen as well.
#
# ESM-2: bfloat16 stays above 0.9999 (on seeded weights, docs/accuracy.md). Rotary tables made in bfloat16 gave 0.9973,
# swapped rows 0.991 (tests/unit/test_audit.py).
#
# DNABERT-S, 12 layers of seeded weights of two kinds, 3 to 3,000 tokens, mean and cls: float32 at most 5.7e-6; float16
# at most 5.4e-3; bfloat16 at least 0.9990 and at most 4.5e-2 in segments of three tokens, 0.9996 and 2.7e-2 from 64 on.
# The mildest of gross mistakes gave at 64 tokens 0.992 (slopes of the heads in another order; at 2,000 the mean hides
# them from bfloat16, with 0.9992, not from float32), 0.991 (a layer without the biases of qkv) and 0.990 (no biases of
# distance); GELU's tanh form 2e-4 or more. tests/unit/test_audit_dnabert.py plants them.
LIMITS = {"fail": (0.99, 1e-2), "warn": (0.999, 1e-4)}
LIMITS_16_BITS = {
    ESM2: {"fail": (0.99, 0.15), "warn": (0.999, 0.05)},
    DNABERT_S: {"fail": (0.99, 0.15), "warn": (0.998, 0.065)},
}


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
    index: Index,
    rows: np.ndarray,
    embedding_of: Callable[[int], np.ndarray],
    source: ModelSource,
    seconds: float,
    outputs: Outputs,
    residues_of: Callable[[int], np.ndarray] | None = None,
) -> Audit:
    """Recompute a short sequence, the longest and random others, as many as time allows, up to MOST_SEQUENCES.

    Which ones are tried, and in which order, depends on the index and the rows alone.

    Args:
        index: holds the tokens.
        rows: int64, index rows with a stored embedding, in any order.
        embedding_of: gives what is stored of a row, float32 (number of outputs * hidden_dim,).
        source: the model whose weights the embeddings were computed with.
        seconds: the most time to recompute sequences, and to load the reference, which imports a package, as well;
            after the first sequence, what is expected to exceed it is not begun.
        outputs: layers, from 0 on, and poolings that are stored, and whether vectors of residues are.
        residues_of: gives those of a row, (num_residues, number of layers * hidden_dim).

    Raises:
        SeqmillError: the weights can't be read.
    """
    start = time.perf_counter()

    def nothing(why: str) -> Audit:
        return Audit(0, math.nan, math.nan, "", f"none: {why}", time.perf_counter() - start, False)

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
        reference = make_reference(architecture, parts, longest)
        begun = time.perf_counter()
        probe, rate = _segments(index, int(rows[lengths.argmax()]))[0][:SHORT_TOKENS], math.inf
        for _ in range(2):  # the first run also reads weights that are memory maps
            if rate == math.inf or time.perf_counter() - begun < seconds:
                begin = time.perf_counter()
                reference.embed(probe, outputs.layers)
                rate = (time.perf_counter() - begin) / operations(architecture, len(probe))
        found: dict[int, tuple[float, float, int]] = {}
        reason = ""
        for position in _candidates(index, rows, lengths):
            row, length = int(rows[position]), int(lengths[position])
            if row in found:
                continue
            segments = _segments(index, row)
            num_operations = sum(operations(architecture, len(tokens)) for tokens in segments)
            allowed = seconds - (time.perf_counter() - begun) if found else max(seconds, FIRST_SECONDS)
            if rate * num_operations > allowed:
                reason = f"whichever sequence was tried may take longer than {allowed:.0f} s"
                continue
            room = min(available_memory(), MOST_BYTES)
            if max(memory(architecture, len(tokens)) for tokens in segments) > room:
                reason = f"the reference needs more than {room / 1e9:.1f} GB of memory for whichever sequence was tried"
                continue
            begin = time.perf_counter()
            hidden = [reference.embed(tokens, outputs.layers) for tokens in segments]
            rate = (time.perf_counter() - begin) / num_operations
            weights = index.row_weights(row)
            if source.family == ESM2 and len(hidden) > 1:
                hidden, weights = [_blended(hidden, index.stride)], np.ones(1)
            expected = [
                _pooled([states[layer] for states in hidden], weights, source.family, pooling)
                for layer, pooling in outputs.pairs
            ]
            stored = np.split(embedding_of(row), len(expected))
            if outputs.per_residue and residues_of is not None:
                (states,) = hidden
                # Rounded as the stored ones are, so that what is compared is the computation.
                expected += [states[layer][1:-1].numpy().astype(outputs.per_residue) for layer in outputs.layers]
                stored += np.split(residues_of(row), len(outputs.layers), axis=1)
            cosines, errors = zip(*map(_compare, stored, expected), strict=True)
            found[row] = (float(np.min(cosines)), float(np.max(errors)), length)  # nan where there is one
    if not found:
        return nothing(reason)
    cosines, errors, done_lengths = (np.array(column) for column in zip(*found.values(), strict=True))
    return Audit(
        sequences=len(found),
        worst_cosine=float(cosines.min()),  # min, max and argmax give nan where there is one
        worst_relative_error=float(errors.max()),
        worst_sequence=index.sequence_id(list(found)[errors.argmax()]),
        reference=reference.name,
        seconds=time.perf_counter() - start,
        longest_included=bool(done_lengths.max() == longest),
    )


def judge(audit: Audit, precision: str, family: str) -> tuple[str, str]:
    """Return "ok", "warn", "fail" or "none" for embeddings computed in `precision`, and a sentence that says why."""
    if not audit.sequences:
        return "none", f"not audited: {audit.reference.removeprefix('none: ')}"
    message = (
        f"{audit.sequences} sequences recomputed ({audit.reference}): worst cosine {audit.worst_cosine:.6f}, "
        f"worst relative error {audit.worst_relative_error:.1e} at {audit.worst_sequence!r}"
    )
    limits = LIMITS_16_BITS[family] if precision in ("bfloat16", "float16") else LIMITS
    for verdict, remedy in (
        ("fail", "do not use these embeddings; compute them in another precision or on another device"),
        ("warn", "they are less exact than they should be"),
    ):
        cosine, error = limits[verdict]
        if not (audit.worst_cosine >= cosine and audit.worst_relative_error <= error):  # so that nan fails
            return verdict, f"{message}; in {precision} at least {cosine} and at most {error:g} are wanted: {remedy}"
    return "ok", message


def _candidates(index: Index, rows: np.ndarray, lengths: np.ndarray) -> list[int]:
    """Return places in `rows`: a short sequence, a longest, random others; the longest again, its time better known."""
    generator = np.random.default_rng([int(index.digest[:16], 16), zlib.crc32(rows)])
    off = np.abs(lengths - SHORT_TOKENS)
    short, longest = (generator.choice(np.flatnonzero(kind)) for kind in (off == off.min(), lengths == lengths.max()))
    others = generator.choice(len(rows), min(len(rows), MOST_SEQUENCES), replace=False)
    places = [*dict.fromkeys((short, longest, *others))][:MOST_SEQUENCES]
    return [*places, longest]


def _segments(index: Index, row: int) -> list[torch.Tensor]:
    return [torch.from_numpy(tokens.astype(np.int64)) for tokens in index.row_segments(row)]


def _blended(hidden: list[dict[int, torch.Tensor]], stride: int) -> dict[int, torch.Tensor]:
    """Return the hidden states of a protein, of those of its windows; see `seqmill.embed.embedder`, but in float64."""
    found = {}
    for layer in hidden[0]:
        windows = [states[layer].double().numpy() for states in hidden]
        sums = np.zeros((stride * (len(windows) - 1) + len(windows[-1]), windows[0].shape[1]))
        shares = np.zeros((len(sums), 1))
        for number, states in enumerate(windows):
            n = len(states) - 2
            share = np.concatenate(([0], np.minimum(np.arange(n) + 1, n - np.arange(n)), [0]))[:, None]
            sums[number * stride : number * stride + n + 2] += share * states
            shares[number * stride : number * stride + n + 2] += share
        for end in (0, -1):
            sums[end] = np.average([states[end] for states in windows], axis=0, weights=[len(w) - 2 for w in windows])
            shares[end] = 1
        found[layer] = torch.from_numpy(sums / shares)
    return found


def _pooled(hidden: list[torch.Tensor], weights: np.ndarray, family: str, pooling: str) -> np.ndarray:
    """Return a sequence's vector, float64, of the hidden states of its segments."""
    tokens = [states[POOLED[family, pooling]].double().numpy() for states in hidden]
    if pooling == "max":
        return np.concatenate(tokens).max(axis=0)

    def average(values: list[np.ndarray]) -> np.ndarray:
        return np.average([of_segment.mean(axis=0) for of_segment in values], axis=0, weights=weights)

    mean = average(tokens)
    return np.sqrt(average([(of_segment - mean) ** 2 for of_segment in tokens])) if pooling == "std" else mean


def _compare(stored: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return the cosine and the relative error, computed in float64, of all numbers; of zeros alone 1 and 0."""
    a, b = stored.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    if not a.any() and not b.any():  # the deviation of a single residue
        return 1.0, 0.0
    with np.errstate(invalid="ignore", divide="ignore"):  # nan says it
        cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        return float(cosine), float(np.linalg.norm(a - b) / np.linalg.norm(b))
