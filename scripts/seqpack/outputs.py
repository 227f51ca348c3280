"""What is read of a model: layers, and poolings by name. Light: imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from seqpack.errors import SeqpackError

# What each is stands in `seqpack.pooling`.
POOLINGS = ("mean", "mean_tokens", "max", "std", "cls")


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
        if unknown := set(self.poolings) - set(POOLINGS):
            raise SeqpackError(f"pooling must be of {', '.join(POOLINGS)}, not {', '.join(sorted(unknown))}")
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


def dataset_name(layer: int, pooling: str, is_first: bool) -> str:
    """Return the name of an output's dataset in embeddings.h5."""
    return "embeddings" if is_first else f"embeddings_{layer}_{pooling}"
