"""Segments of a sequence: windows that cover it, and the other strand."""

from Bio.Seq import Seq
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmill.index.segments import cut, reverse_complement, window_spans

few = settings(max_examples=50, deadline=None)
sequences = st.text("ACGTRYSWKMBDHVN", max_size=60).map(str.encode)


@st.composite
def windows(draw: st.DrawFn) -> tuple[int, int]:
    window = draw(st.integers(1, 12))
    return window, draw(st.integers(1, window))


def test_spans_by_hand() -> None:
    assert window_spans(25, 10, 10) == [(0, 10), (10, 20), (20, 25)]
    assert window_spans(30, 10, 10) == [(0, 10), (10, 20), (20, 30)]
    assert window_spans(25, 10, 5) == [(0, 10), (5, 15), (10, 20), (15, 25)]
    assert window_spans(26, 10, 5) == [(0, 10), (5, 15), (10, 20), (15, 25), (20, 26)]
    assert window_spans(11, 10, 9) == [(0, 10), (9, 11)]
    assert window_spans(10, 10, 3) == window_spans(10, 11, 3) == window_spans(10, 0, 0) == [(0, 10)]
    assert window_spans(1, 10, 10) == [(0, 1)]


@few
@given(st.integers(1, 100), windows())
def test_windows_cover_every_base_and_none_is_needless(length: int, sizes: tuple[int, int]) -> None:
    window, stride = sizes
    spans = window_spans(length, window, stride)
    assert [start for start, _ in spans] == [number * stride for number in range(len(spans))]
    assert {base for start, end in spans for base in range(start, end)} == set(range(length))
    assert all(end - start == window for start, end in spans[:-1])
    assert 1 <= spans[-1][1] - spans[-1][0] <= window
    assert all(end < length for _, end in spans[:-1])
    assert spans[-1][1] == length


@few
@given(sequences)
def test_reverse_complement_is_biopythons_and_its_own_inverse(sequence: bytes) -> None:
    assert reverse_complement(sequence).decode() == str(Seq(sequence.decode()).reverse_complement())
    assert reverse_complement(sequence.lower()) == reverse_complement(sequence).lower()
    assert reverse_complement(reverse_complement(sequence)) == sequence


@few
@given(sequences, windows())
def test_cut_is_the_windows_of_each_strand(sequence: bytes, sizes: tuple[int, int]) -> None:
    forward = cut(sequence, *sizes)
    both = cut(sequence, *sizes, "both")
    assert forward == [sequence[start:end] for start, end in window_spans(len(sequence), *sizes)]
    assert both == forward + cut(reverse_complement(sequence), *sizes)


def test_cut_by_hand() -> None:
    assert cut(b"AACCGGTN") == [b"AACCGGTN"]
    assert cut(b"AACCGGTN", strand="both") == [b"AACCGGTN", b"NACCGGTT"]
    assert cut(b"AACCGGTN", 5, 3) == [b"AACCG", b"CGGTN"]
    assert cut(b"AACCGGTNR", 5, 3, "both") == [b"AACCG", b"CGGTN", b"TNR", b"YNACC", b"CCGGT", b"GTT"]
