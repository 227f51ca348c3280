"""Seeded proteins, the error between two arrays, and the descriptions in an index; needs only NumPy and the package."""

import numpy as np

from seqmill.base.text_columns import split_texts, texts_end_to_end
from seqmill.store.index import Index


def random_sequences(lengths: list[int], seed: int = 11) -> list[str]:
    """Return seeded proteins of the given lengths, with all 25 letters that ESM-2 knows."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("LAGVSERTIDPKQNFYMHWCXBUZO"))
    return ["".join(generator.choice(letters, length)) for length in lengths]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the relative L2 error."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def record_descriptions(index: Index) -> list[str]:
    """Return the description of every record."""
    columns = index.record_descriptions, index.record_description_offsets
    return split_texts(*texts_end_to_end(*columns, np.arange(index.num_records)))
