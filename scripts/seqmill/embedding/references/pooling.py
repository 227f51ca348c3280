"""The audit's pooling: windows blended and hidden states pooled in float64, as `seqmill.embedding` does in float32."""

import numpy as np
import torch

from seqmill.spec.families import DNABERT_S, Family


def blend(hidden: list[dict[int, torch.Tensor]], stride: int, family: Family) -> dict[int, torch.Tensor]:
    """Blend the hidden states of a protein's windows, as `seqmill.embedding.embedder` does, but in float64."""
    found, special = {}, family.before + family.after
    for layer in hidden[0]:
        windows = [states[layer].double().numpy() for states in hidden]
        sums = np.zeros((stride * (len(windows) - 1) + len(windows[-1]), windows[0].shape[1]))
        shares = np.zeros((len(sums), 1))
        for number, states in enumerate(windows):
            n = len(states) - special
            share = np.minimum(np.arange(n) + 1, n - np.arange(n))
            share = np.pad(share, (family.before, family.after))[:, None]
            sums[number * stride : number * stride + len(states)] += share * states
            shares[number * stride : number * stride + len(states)] += share
        lengths = [len(window) - special for window in windows]
        for end in (*range(family.before), *range(-family.after, 0)):
            sums[end] = np.average([states[end] for states in windows], axis=0, weights=lengths)
            shares[end] = 1
        found[layer] = torch.from_numpy(sums / shares)
    return found


def pool(hidden: list[torch.Tensor], weights: np.ndarray, family: Family, pooling: str) -> np.ndarray:
    """Pool the hidden states of a sequence's segments into its vector, float64."""
    inner, first, whole = slice(family.before, -family.after), slice(0, 1), slice(None)
    used = first if pooling == "cls" else whole if (family, pooling) == (DNABERT_S, "mean") else inner
    tokens = [states[used].double().numpy() for states in hidden]
    if pooling == "max":
        return np.concatenate(tokens).max(axis=0)

    def average(values: list[np.ndarray]) -> np.ndarray:
        return np.average([of_segment.mean(axis=0) for of_segment in values], axis=0, weights=weights)

    mean = average(tokens)
    return np.sqrt(average([(of_segment - mean) ** 2 for of_segment in tokens])) if pooling == "std" else mean
