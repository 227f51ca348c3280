"""Runs with several outputs, and NumPy code that pools and blends hidden states."""

import numpy as np
import torch

from pipeline import Run, run_script
from reference import ALPHABET
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.outputs import Outputs

# 60 residues or fewer, one residue more than a window, and many windows with a short last one.
LENGTHS = [60, 61, 12, 400, 85, 130, 1, 121]
POLICIES = {
    "half": LengthPolicy("window", 60, 60, 30),
    "nearly whole": LengthPolicy("window", 60, 60, 59),
    "apart": LengthPolicy("window", 60, 60, 60),
    "dense": LengthPolicy("window", 60, 41, 3),
}


def pooled_by_hand(tokens: np.ndarray, pooling: str, special_too: bool) -> np.ndarray:
    """Pool hidden states (num_tokens, hidden_dim) into one float64 vector."""
    inner = tokens[1:-1]
    return {
        "cls": lambda: tokens[0],
        "mean": lambda: (tokens if special_too else inner).mean(axis=0),
        "mean_tokens": lambda: inner.mean(axis=0),
        "max": lambda: inner.max(axis=0),
        "std": lambda: inner.std(axis=0),
    }[pooling]()


def hidden_by_hand(texts: list[str], model: torch.nn.Module, layers: tuple[int, ...]) -> dict[int, np.ndarray]:
    """Return fair-esm's hidden states by layer, for texts of one length: (texts, letters + 2, hidden_dim)."""
    tokens = torch.tensor([[0, *(ALPHABET.get_idx(letter) for letter in text), 2] for text in texts])
    with torch.no_grad():
        found = model(tokens, repr_layers=layers)["representations"]
    return {layer: found[layer].numpy() for layer in layers}


def spans_by_hand(length: int, policy: LengthPolicy) -> list[tuple[int, int]]:
    """Return where the windows of a sequence begin and end; the last may be shorter."""
    size = policy.window if policy.window and length > policy.max_length else length
    spans = [(0, min(size, length))]
    while spans[-1][1] < length:
        begin = spans[-1][0] + policy.stride
        spans.append((begin, min(begin + size, length)))
    return spans


def blend_by_hand(spans: list[tuple[int, int]], windows: list[np.ndarray], before: int = 1) -> np.ndarray:
    """Return the weighted mean of a sequence's vectors over its windows, which have `before` special tokens and one
    after: residues by their distance to the window's nearest end, special tokens by the window's length.
    """
    length = spans[-1][1]
    votes: list[list[tuple[float, np.ndarray]]] = [[] for _ in range(before + length + 1)]
    for (begin, end), hidden in zip(spans, windows, strict=True):
        for special in (*range(before), -1):
            votes[special].append((end - begin, hidden[special]))
        for residue in range(begin, end):
            votes[before + residue].append((min(residue - begin + 1, end - residue), hidden[before + residue - begin]))
    return np.array([np.average([v for _, v in of], axis=0, weights=[w for w, _ in of]) for of in votes])


def blended_by_hand(
    sequence: str, policy: LengthPolicy, model: torch.nn.Module, layers: tuple[int, ...]
) -> dict[int, np.ndarray]:
    """Return fair-esm's vectors by layer, blended over windows."""
    spans = spans_by_hand(len(sequence), policy)
    *whole, last = (sequence[begin:end] for begin, end in spans)  # the last may be shorter
    states = hidden_by_hand(whole, model, layers) if whole else {}
    of_last = hidden_by_hand([last], model, layers)
    return {layer: blend_by_hand(spans, [*states.get(layer, []), *of_last[layer]]) for layer in layers}


def embed(run: Run, outputs: Outputs, dtype: str = "float32", **settings: object) -> Run:
    run.embed(outputs=outputs, **settings)
    arguments = ["--index", run.index, "--shards", *run.shards, "--output", run.embeddings, "--dtype", dtype]
    done = run_script("merge_shards.py", *arguments)
    assert done.returncode == 0, done.stderr
    return run
