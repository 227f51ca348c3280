"""Seeded proteins, and the error between two arrays; needs only NumPy."""

import numpy as np


def random_sequences(lengths: list[int], seed: int = 11) -> list[str]:
    """Return seeded proteins of the given lengths, with all 25 letters that ESM-2 knows."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("LAGVSERTIDPKQNFYMHWCXBUZO"))
    return ["".join(generator.choice(letters, length)) for length in lengths]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the relative L2 error."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
