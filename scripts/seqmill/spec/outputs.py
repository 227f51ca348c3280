"""The outputs of a run: layers to read, poolings, residue vectors. Imports no torch."""

from dataclasses import dataclass, replace

from seqmill.errors import SeqmillError
from seqmill.spec.families import Family

POOLINGS = ("mean", "mean_tokens", "max", "std", "cls")  # defined in `seqmill.embedding.pooling`
RESIDUE_DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class Outputs:
    """Layers to read and poolings to apply to each.

    Layers are numbered as in fair-esm: 0 is the embedding of the tokens, k the output of block k; negative numbers
    count from the end, -1 is the last, after the model's last norm (DNABERT-S has none).
    """

    layers: tuple[int, ...] = (-1,)
    poolings: tuple[str, ...] = ("mean",)  # names from `POOLINGS`
    per_residue: str = ""  # dtype in which residue vectors are stored as well; empty if they are not stored

    def __post_init__(self) -> None:
        if unknown := set(self.poolings) - set(POOLINGS):
            raise SeqmillError(f"pooling must be of {', '.join(POOLINGS)}, not {', '.join(sorted(unknown))}")
        if self.per_residue and self.per_residue not in RESIDUE_DTYPES:
            raise SeqmillError(f"per_residue must be {' or '.join(RESIDUE_DTYPES)}, not {self.per_residue}")
        for name, values in (("layers", self.layers), ("poolings", self.poolings)):
            if not values or len(set(values)) < len(values):
                shown = ", ".join(map(str, values)) or "none"
                raise SeqmillError(f"{name} must be one or more, each once, not {shown}")

    @property
    def pairs(self) -> list[tuple[int, str]]:
        """Layer and pooling of each output, in order."""
        return [(layer, pooling) for layer in self.layers for pooling in self.poolings]

    def of(self, num_layers: int) -> "Outputs":
        """Return the outputs with layers from 0 on; raise a SeqmillError if a layer is not in the model, or twice."""
        for layer in self.layers:
            if not -num_layers - 1 <= layer <= num_layers:
                raise SeqmillError(f"layer {layer}: the model has layers 0 to {num_layers}, or -{num_layers + 1} to -1")
        return replace(self, layers=tuple(layer % (num_layers + 1) for layer in self.layers))

    def require_family(self, family: Family) -> None:
        """Raise a SeqmillError if residue vectors or the cls token's are requested from a family without them."""
        if self.per_residue and not family.is_protein:
            raise SeqmillError("per_residue is for proteins: a token of a nucleotide model stands for several bases")
        if "cls" in self.poolings and not family.has_cls:
            raise SeqmillError(f"pooling cls: {family.title} has no cls token; use mean, max, or std")


def dataset_name(layer: int, pooling: str, is_first: bool) -> str:
    """Return the name of an output's dataset in embeddings.h5."""
    return "embeddings" if is_first else f"embeddings_{layer}_{pooling}"


def residue_dataset(layer: int, is_first: bool) -> str:
    """Return the name of the dataset of a layer's residue vectors in embeddings.h5."""
    return "residues" if is_first else f"residues_{layer}"
