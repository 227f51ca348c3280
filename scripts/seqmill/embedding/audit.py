"""The audit: recompute a few sequences of a shard in another way and compare with the stored vectors.

`references` has this other way. It shares no forward, kernel, pack, order or pooling with the worker, only the
reading of the index and of the weights.
"""

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from seqmill.base.machine import available_memory
from seqmill.embedding.references.families import make_reference, memory, operations
from seqmill.embedding.references.pooling import blend, pool
from seqmill.embedding.references.reference import Reference
from seqmill.model.weights import open_weights, parameter_shapes, untrained_tensors
from seqmill.spec.architectures import Architecture
from seqmill.spec.families import DNABERT_S, ESM2, ESMC, PROSTT5, PROTT5, Family
from seqmill.spec.models import ModelSource
from seqmill.spec.outputs import Outputs
from seqmill.store.index import Index
from seqmill.store.status import AuditFacts

VectorsOf = Callable[[int], np.ndarray]  # the stored vector or vectors of a row

MOST_SEQUENCES = 8
# The first sequence may always take this long: a busy machine must not leave a shard without an audit, but a contig of
# a million bases must not delay it for hours.
FIRST_SECONDS = 60.0
SHORT_TOKENS = 64  # enough for the matrix products to dominate the time
# Expected speed of loading float32 weights: seeded ones are generated, a file is in the page cache.
MADE_BYTES_PER_SECOND, READ_BYTES_PER_SECOND = 0.5e9, 1.5e9
# Sequences that need more are skipped even if it is free, so that the audit does not decide a job's memory. fair-esm
# holds length x length scores of all heads.
MOST_BYTES = 2e9
MEMORY_FACTOR = 1.3  # relative to the weights

# Limits of the verdicts: lowest cosine, highest relative error (measurements: docs/explanation/accuracy.md). The errors
# for 16 bits follow from the cosines, for vectors of equal length, rounded up; they show a wrong length as well.
LIMITS = {"fail": (0.99, 1e-2), "warn": (0.999, 1e-4)}
OF_PROTEINS = {"fail": (0.99, 0.15), "warn": (0.999, 0.05)}
LIMITS_16_BITS = {
    ESM2: OF_PROTEINS,
    ESMC: OF_PROTEINS,
    PROTT5: OF_PROTEINS,
    PROSTT5: OF_PROTEINS,
    DNABERT_S: {"fail": (0.99, 0.15), "warn": (0.998, 0.065)},
}
# Not beyond those for 16 bits, where mistakes hide in the rounding: DNABERT-S with seeded weights fails in float8.
LIMITS_FLOAT8 = {"fail": (0.99, 0.15), "warn": (0.992, 0.13)}


@dataclass(frozen=True)
class StoredVectors:
    """The vectors to audit."""

    index: Index
    outputs: Outputs  # with layers from 0 on
    embedding_of: VectorsOf  # float32 (number of outputs * hidden_dim,)
    residues_of: VectorsOf | None = None  # (num_residues, number of layers * hidden_dim)

    def compare(self, row: int, hidden: list[dict[int, torch.Tensor]]) -> tuple[float, float]:
        """Return the lowest cosine and highest relative error of a row's vectors; nan if one is.

        `hidden` are the reference's hidden states of each segment, by layer.
        """
        weights, family = self.index.row_weights(row), self.index.family
        if family.is_protein and len(hidden) > 1:
            hidden, weights = [blend(hidden, self.index.stride, family)], np.ones(1)
        expected = [
            pool([states[layer] for states in hidden], weights, family, pooling)
            for layer, pooling in self.outputs.pairs
        ]
        stored = np.split(self.embedding_of(row), len(expected))
        if self.outputs.per_residue and self.residues_of is not None:
            (states,) = hidden
            # Rounded like the stored ones, so that only the computation is compared.
            dtype, layers = self.outputs.per_residue, self.outputs.layers
            residues = slice(family.before, -family.after)
            expected += [states[layer][residues].numpy().astype(dtype) for layer in layers]
            stored += np.split(self.residues_of(row), len(layers), axis=1)
        cosines, errors = zip(*map(_compare, stored, expected), strict=True)
        return float(np.min(cosines)), float(np.max(errors))


def audit_embeddings(stored: StoredVectors, source: ModelSource, rows: np.ndarray, seconds: float) -> AuditFacts:
    """Recompute a short sequence, the longest and random others, as many as time allows, up to MOST_SEQUENCES.

    Which sequences are tried, and in which order, depends only on the index and the rows. The worst cosine and relative
    error are nan if a stored vector is zero or not finite.

    Args:
        stored: the vectors.
        source: the model whose weights the embeddings were computed with.
        rows: int64, index rows with a stored embedding, in any order.
        seconds: limit for loading the reference, and again for the sequences: after the first, one that is expected to
            exceed it is not started.

    Raises:
        SeqmillError: the weights can't be read.
    """
    start, index = time.perf_counter(), stored.index
    if not len(rows):
        return not_audited("there are no sequences")
    is_untrained = source.kind == "untrained"
    architecture, tensors = (source.architecture, None) if is_untrained else open_weights(source)
    assert architecture is not None  # untrained weights have one
    speed = MADE_BYTES_PER_SECOND if is_untrained else READ_BYTES_PER_SECOND
    if reason := _why_not_loaded(architecture, speed, seconds):
        return not_audited(reason, time.perf_counter() - start)
    rows = np.sort(rows)
    longest = int(_lengths(index, rows).max())
    with torch.inference_mode():
        if tensors is None:
            tensors = {name: [tensor] for name, tensor in untrained_tensors(architecture).items()}
        reference = make_reference(architecture, tensors, longest)
        found, reason = _recompute(stored, rows, reference, architecture, seconds)
    if not found:
        return not_audited(reason, time.perf_counter() - start)
    cosines, errors, lengths = (np.array(column) for column in zip(*found.values(), strict=True))
    return AuditFacts(
        sequences=len(found),
        worst_cosine=float(cosines.min()),  # min, max and argmax return nan where there is one
        worst_relative_error=float(errors.max()),
        worst_sequence=index.sequence_id(list(found)[errors.argmax()]),
        reference=reference.name,
        seconds=time.perf_counter() - start,
        longest_included=bool(lengths.max() == longest),
    )


def not_audited(why: str, seconds: float = 0.0) -> AuditFacts:
    """Return the result of an audit that recomputed nothing."""
    return AuditFacts(
        sequences=0,
        worst_cosine=math.nan,
        worst_relative_error=math.nan,
        worst_sequence="",
        reference=f"none: {why}",
        seconds=seconds,
        longest_included=False,
    )


def _why_not_loaded(architecture: Architecture, bytes_per_second: float, seconds: float) -> str:
    """Return why the reference can't be loaded, by its time and memory; empty if it can."""
    num_bytes = 4 * sum(math.prod(shape) for shape in parameter_shapes(architecture).values())
    needed, free = num_bytes * MEMORY_FACTOR, available_memory()
    if num_bytes / bytes_per_second > seconds:
        return f"loading the weights may take {num_bytes / bytes_per_second:.0f} s, and {seconds:g} s are allowed"
    if needed > free:
        return f"it needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    return ""


def _recompute(
    stored: StoredVectors, rows: np.ndarray, reference: Reference, architecture: Architecture, seconds: float
) -> tuple[dict[int, tuple[float, float, int]], str]:
    """Recompute rows within the time limit.

    Return by row the lowest cosine, the highest relative error and the number of tokens; and why the last skipped row
    was skipped.
    """
    index, layers = stored.index, stored.outputs.layers
    lengths = _lengths(index, rows)
    begun, rate = time.perf_counter(), math.inf  # rate: seconds per operation
    probe = _segments(index, int(rows[lengths.argmax()]))[0][:SHORT_TOKENS]
    for _ in range(2):  # the first run also reads weights that are memory maps
        if rate == math.inf or time.perf_counter() - begun < seconds:
            begin = time.perf_counter()
            reference.embed(probe, layers)
            rate = (time.perf_counter() - begin) / operations(architecture, len(probe))
    found: dict[int, tuple[float, float, int]] = {}
    reason = ""
    for position in _candidates(index, rows, lengths):
        row = int(rows[position])
        if row in found:
            continue
        segments = _segments(index, row)
        num_operations = sum(operations(architecture, len(tokens)) for tokens in segments)
        allowed = seconds - (time.perf_counter() - begun) if found else max(seconds, FIRST_SECONDS)
        if rate * num_operations > allowed:
            reason = f"each sequence that was tried may take longer than {allowed:.0f} s"
            continue
        room = min(available_memory(), MOST_BYTES)
        if max(memory(architecture, len(tokens)) for tokens in segments) > room:
            reason = f"the reference needs more than {room / 1e9:.1f} GB of memory for each sequence that was tried"
            continue
        begin = time.perf_counter()
        hidden = [reference.embed(tokens, layers) for tokens in segments]
        rate = (time.perf_counter() - begin) / num_operations
        found[row] = (*stored.compare(row, hidden), int(lengths[position]))
    return found, reason


def judge(audit: AuditFacts, precision: str, family: Family) -> tuple[str, str]:
    """Return the verdict on embeddings computed in `precision` ("ok", "warn", "fail" or "none") and a message."""
    if not audit.sequences:
        return "none", f"not audited: {(audit.reference or '').removeprefix('none: ')}"
    assert audit.worst_cosine is not None
    assert audit.worst_relative_error is not None
    message = (
        f"{audit.sequences} sequences recomputed ({audit.reference}): worst cosine {audit.worst_cosine:.6f}, "
        f"worst relative error {audit.worst_relative_error:.1e} at {audit.worst_sequence!r}"
    )
    limits = LIMITS_FLOAT8 if precision == "float8" else LIMITS
    if precision in ("bfloat16", "float16"):
        limits = LIMITS_16_BITS[family]
    for verdict, remedy in (
        ("fail", "do not use these embeddings; compute them in another precision or on another device"),
        ("warn", "they are less exact than they should be"),
    ):
        cosine, error = limits[verdict]
        if not (audit.worst_cosine >= cosine and audit.worst_relative_error <= error):  # nan fails
            return verdict, f"{message}; in {precision} at least {cosine} and at most {error:g} are required: {remedy}"
    return "ok", message


def _candidates(index: Index, rows: np.ndarray, lengths: np.ndarray) -> list[int]:
    """Return places in `rows`: a short sequence, a longest, random others, the longest again with its time known."""
    generator = np.random.default_rng([int(index.digest[:16], 16), zlib.crc32(rows)])
    off = np.abs(lengths - SHORT_TOKENS)
    short, longest = (generator.choice(np.flatnonzero(kind)) for kind in (off == off.min(), lengths == lengths.max()))
    others = generator.choice(len(rows), min(len(rows), MOST_SEQUENCES), replace=False)
    places = [*dict.fromkeys((short, longest, *others))][:MOST_SEQUENCES]
    return [*places, longest]


def _lengths(index: Index, rows: np.ndarray) -> np.ndarray:
    return index.token_offsets[rows + 1] - index.token_offsets[rows]


def _segments(index: Index, row: int) -> list[torch.Tensor]:
    return [torch.from_numpy(tokens.astype(np.int64)) for tokens in index.row_segments(row)]


def _compare(stored: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return the cosine and the relative error, computed in float64; 1 and 0 if both are zero."""
    a, b = stored.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    if not a.any() and not b.any():  # the deviation of a single residue
        return 1.0, 0.0
    with np.errstate(invalid="ignore", divide="ignore"):  # the result is nan
        cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        return float(cosine), float(np.linalg.norm(a - b) / np.linalg.norm(b))
