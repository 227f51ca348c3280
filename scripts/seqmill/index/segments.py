"""Segments: what of a sequence goes through the model by itself. Windows of long contigs, and both strands."""

from __future__ import annotations

from dataclasses import dataclass

# IUPAC-IUB 1984 (doi:10.1093/nar/13.9.3021); S, W and N are their own complements.
_COMPLEMENT = bytes.maketrans(b"ACGTRYKMBVDHacgtrykmbvdh", b"TGCAYRMKVBHDtgcayrmkvbhd")


@dataclass(frozen=True)
class Segmentation:
    """How a sequence is cut into segments.

    Attributes:
        window: bases of a window; 0 for no windows.
        stride: bases from one window's start to the next, 1 to `window`; unused without windows.
        strand: "forward", or "both" to have the segments of the reverse complement too.
    """

    window: int = 0
    stride: int = 0
    strand: str = "forward"


def window_spans(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Return start and end (exclusive) of the windows that cover `length` bases; the last one may be shorter.

    Windows start at 0, stride, 2 * stride ... up to the first that reaches the end. One span if `window` is 0 (no
    windows) or not below `length`. Expects stride <= window, so that every base is covered.
    """
    if window == 0 or length <= window:
        return [(0, length)]
    # The first window that reaches the end is number ceil((length - window) / stride).
    count = -(-(length - window) // stride) + 1
    return [(start, min(start + window, length)) for start in range(0, count * stride, stride)]


def reverse_complement(sequence: bytes) -> bytes:
    """Return the other strand, read in its own direction; IUPAC codes are complemented, case is kept."""
    return sequence.translate(_COMPLEMENT)[::-1]


def known_bases(segment: bytes) -> int:
    """Return how many bases of a segment are known: A, C, G or T, no N or other IUPAC code."""
    return len(segment) - len(segment.translate(None, b"ACGT"))


def weigh(segments: list[bytes]) -> tuple[list[bytes], list[int]]:
    """Return the segments that count and their weights: the known bases of each.

    A window of nothing but N, a gap of a scaffold, would be nothing but unknown tokens, so it is left out. If there
    is no other, all stay and weigh by their length.
    """
    weights = [known_bases(segment) for segment in segments]
    if not any(weights):
        return segments, [len(segment) for segment in segments]
    return [segment for segment, weight in zip(segments, weights, strict=True) if weight], [w for w in weights if w]


def cut(sequence: bytes, segmentation: Segmentation) -> list[bytes]:
    """Return the segments: the windows in order, then for strand "both" those of the reverse complement.

    Args:
        sequence: cleaned bases, one byte each (`NucleotideLetters.clean`).
    """
    strands = [sequence, reverse_complement(sequence)] if segmentation.strand == "both" else [sequence]
    spans = window_spans(len(sequence), segmentation.window, segmentation.stride)
    return [strand[start:end] for strand in strands for start, end in spans]
