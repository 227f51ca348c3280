"""Runs with several outputs, and the pooling of hidden states written out in NumPy."""

from __future__ import annotations

import numpy as np

from pipeline import Run, run_script
from seqmill.spec.outputs import Outputs


def pooled_by_hand(tokens: np.ndarray, pooling: str, special_too: bool) -> np.ndarray:
    """Return a vector of hidden states (num_tokens, hidden_dim), float64."""
    inner = tokens[1:-1]
    return {
        "cls": lambda: tokens[0],
        "mean": lambda: (tokens if special_too else inner).mean(axis=0),
        "mean_tokens": lambda: inner.mean(axis=0),
        "max": lambda: inner.max(axis=0),
        "std": lambda: inner.std(axis=0),
    }[pooling]()


def embed(run: Run, outputs: Outputs, dtype: str = "float32", **settings: object) -> Run:
    run.embed(outputs=outputs, **settings)
    arguments = ["--index", run.index, "--shards", *run.shards, "--output", run.embeddings, "--dtype", dtype]
    done = run_script("merge_shards.py", *arguments)
    assert done.returncode == 0, done.stderr
    return run
