"""Imports of large libraries."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from seqmill.base.signals import held_back_signals


@contextmanager
def importing_much() -> Iterator[None]:
    """Import in the block without looking for garbage, then or later, and delay the handlers of signals until its end.

    While torch is imported, its C++ code calls Python; an exception from a handler would abort the process there.

    The hundreds of thousands of objects that torch creates live to the end. Looking for garbage among them takes a
    sixth of its import, and half a second when the process ends (docs/explanation/performance.md).
    """
    if "torch" in sys.modules:  # nothing to save, and an earlier import's garbage would stay
        yield
        return
    gc.disable()
    try:
        with held_back_signals():
            yield
    finally:
        gc.freeze()
        gc.enable()
