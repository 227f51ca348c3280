"""What is read of a model: layers, and poolings by name. Light: imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from seqpack.errors import SeqpackError
from seqpack.models.registry import DNABERT_S, ESM2

# By family; what each is stands in `seqpack.pooling`.
POOLINGS = {ESM2: ("mean", "max", "std", "cls"), DNABERT_S: ("mean", "mean_tokens", "max", "std", "cls")}
ALL_POOLINGS = tuple(dict.fromkeys(name for names in POOLINGS.values() for name in names))


@dataclass(frozen=True)
class Outputs:
    """Layers to read and poolings to apply to each.

    Attributes:
        layers: counted as fair-esm counts them: 0 is the embedding of the tokens, k the output of block k; negative
            ones from the end, -1 being the last (of ESM-2 after its layer norm).
        poolings: names, see `POOLINGS`.
    """

    layers: tuple[int, ...] = (-1,)
    poolings: tuple[str, ...] = ("mean",)

    def __post_init__(self) -> None:
        for name, values in (("layers", self.layers), ("poolings", self.poolings)):
            if not values or len(set(values)) < len(values):
                raise SeqpackError(
                    f"{name} must be one or more, each once, not {', '.join(map(str, values)) or 'none'}"
                )

    @property
    def pairs(self) -> list[tuple[int, str]]:
        """Layer and pooling of each output, in order."""
        return [(layer, pooling) for layer in self.layers for pooling in self.poolings]

    def of(self, num_layers: int) -> Outputs:
        """Return the same with layers from 0 on.

        Raises:
            SeqpackError: the model has no such layer, or two of them are one.
        """
        for layer in self.layers:
            if not -num_layers - 1 <= layer <= num_layers:
                raise SeqpackError(f"layer {layer}: the model has layers 0 to {num_layers}, or -{num_layers + 1} to -1")
        return Outputs(tuple(layer % (num_layers + 1) for layer in self.layers), self.poolings)


def require_poolings(family: str, poolings: tuple[str, ...]) -> None:
    """Raise a SeqpackError if a family of models has not these poolings."""
    for pooling in poolings:
        if pooling not in POOLINGS[family]:
            raise SeqpackError(f"pooling {pooling} is not one of {family}: use {' or '.join(POOLINGS[family])}")


def dataset_name(layer: int, pooling: str, is_first: bool) -> str:
    """Return the name of an output's dataset in embeddings.h5."""
    return "embeddings" if is_first else f"embeddings_{layer}_{pooling}"
