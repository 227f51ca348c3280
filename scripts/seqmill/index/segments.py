"""Segments, the parts of a sequence that go through the model separately: windows, and both strands."""

# IUPAC-IUB 1984 (doi:10.1093/nar/13.9.3021); S, W and N are their own complements.
_COMPLEMENT = bytes.maketrans(b"ACGTRYKMBVDHacgtrykmbvdh", b"TGCAYRMKVBHDtgcayrmkvbhd")


def window_spans(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Return start and end (exclusive) of the windows that cover `length` letters; the last may be shorter.

    Windows start at 0, stride, 2 * stride ... up to the first that reaches the end. There is one span if `window` is 0
    (no windows) or at least `length`. Expects stride <= window, so that every letter is covered.
    """
    if window == 0 or length <= window:
        return [(0, length)]
    # The first window that reaches the end is number ceil((length - window) / stride).
    count = -(-(length - window) // stride) + 1
    return [(start, min(start + window, length)) for start in range(0, count * stride, stride)]


def reverse_complement(sequence: bytes) -> bytes:
    """Return the other strand in its own reading direction; IUPAC codes are complemented, case is kept."""
    return sequence.translate(_COMPLEMENT)[::-1]


def known_bases(segment: bytes) -> int:
    """Return the number of known bases: A, C, G and T, not N or other IUPAC codes."""
    return len(segment) - len(segment.translate(None, b"ACGT"))


def weigh(segments: list[bytes]) -> tuple[list[bytes], list[int]]:
    """Return the segments to compute and their weights: the number of known bases in each.

    A window of N only, a scaffold gap, would give only unknown tokens, so it is dropped. If no segment has a known
    base, all are kept, with their lengths as weights.
    """
    weights = [known_bases(segment) for segment in segments]
    if not any(weights):
        return segments, [len(segment) for segment in segments]
    return [segment for segment, weight in zip(segments, weights, strict=True) if weight], [w for w in weights if w]


def cut(sequence: bytes, window: int = 0, stride: int = 0, strand: str = "forward") -> list[bytes]:
    """Return the segments of a nucleotide sequence: its windows in order, then those of its reverse complement.

    Args:
        sequence: cleaned bases, one byte each (`NucleotideLetters.clean`).
        window: bases per window; 0 for no windows.
        stride: bases from one window's start to the next, 1 to `window`; unused without windows.
        strand: "forward", or "both" to add the reverse complement.
    """
    strands = [sequence, reverse_complement(sequence)] if strand == "both" else [sequence]
    spans = window_spans(len(sequence), window, stride)
    return [one[start:end] for one in strands for start, end in spans]
