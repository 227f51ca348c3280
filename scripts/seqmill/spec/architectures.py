"""The architectures of the model families: their sizes, parameters, and operations. Imports no torch."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

from seqmill.spec.families import DNABERT_S, ESM2, ESMC, PROSTT5, PROTT5, Family

if TYPE_CHECKING:
    import numpy as np

# Several times the sizes of any published model; larger ones are damage, or an attempt to exhaust the memory.
MOST_LAYERS, MOST = 1_000, 1_000_000


@dataclass(frozen=True)
class Architecture:
    """The sizes that all families have; raises a ValueError for impossible ones."""

    num_layers: int
    hidden_dim: int
    num_heads: int
    vocabulary: int
    layer_vectors: ClassVar[int]  # parameters in a layer's biases and norms, divided by hidden_dim
    other_vectors: ClassVar[int] = 2  # the same outside the layers, but the table of tokens

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            most = MOST_LAYERS if name == "num_layers" else MOST
            if name != "token_dropout" and (type(value) is not int or not 1 <= value <= most):
                raise ValueError(f"{name} is {value!r}, not a whole number from 1 to {most:,}")
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}, which does not divide hidden_dim {self.hidden_dim}")

    @property
    def family(self) -> Family:
        raise NotImplementedError

    @property
    def head_dim(self) -> int:
        return self.hidden_dim // self.num_heads

    @property
    def inner_dim(self) -> int:
        """The width of queries, keys, and values, all heads together."""
        return self.num_heads * self.head_dim

    @property
    def ffn_dim(self) -> int:
        return 4 * self.hidden_dim

    @property
    def ffn_matrices(self) -> int:
        """Matrices between the residual stream and the feed-forward: 3 if it is gated."""
        return 2

    @property
    def matrix_parameters(self) -> int:
        """Parameters in all layers' matrices, each 2 FLOP per token."""
        return self.num_layers * self.hidden_dim * (4 * self.inner_dim + self.ffn_matrices * self.ffn_dim)

    @property
    def num_parameters(self) -> int:
        """All parameters that the encoder uses."""
        vectors = self.num_layers * self.layer_vectors + self.vocabulary + self.other_vectors
        return self.matrix_parameters + vectors * self.hidden_dim


def _require_even_heads(architecture: Architecture) -> None:
    if architecture.head_dim % 2:
        heads, dim = architecture.num_heads, architecture.head_dim
        raise ValueError(f"num_heads is {heads}, so heads are {dim} wide, not an even number")


@dataclass(frozen=True)
class Esm2Architecture(Architecture):
    """The shape of an ESM-2 model (Lin et al. 2023, doi:10.1126/science.ade2574; fair-esm 2.0.0)."""

    vocabulary: int = 33
    token_dropout: bool = True
    layer_vectors: ClassVar[int] = 13

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_even_heads(self)

    @property
    def family(self) -> Family:
        return ESM2


@dataclass(frozen=True)
class DnabertArchitecture(Architecture):
    """The shape of DNABERT-2 (Zhou et al. 2023, arXiv:2306.15006) and of DNABERT-S, which was trained from it."""

    num_layers: int = 12
    hidden_dim: int = 768
    num_heads: int = 12
    vocabulary: int = 4096
    token_types: int = 2
    layer_vectors: ClassVar[int] = 9

    @property
    def family(self) -> Family:
        return DNABERT_S

    @property
    def ffn_matrices(self) -> int:
        return 3

    @property
    def num_parameters(self) -> int:
        return super().num_parameters + self.token_types * self.hidden_dim


@dataclass(frozen=True)
class EsmcArchitecture(Architecture):
    """The shape of an ESM C model (esm 3.4.1, `esm/models/esmc`)."""

    vocabulary: int = 64  # rows of the table; tokens are ESM-2's
    layer_vectors: ClassVar[int] = 6
    other_vectors: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_even_heads(self)

    @property
    def family(self) -> Family:
        return ESMC

    @property
    def ffn_dim(self) -> int:
        return -(-8 * self.hidden_dim // 3 // 256) * 256

    @property
    def ffn_matrices(self) -> int:
        return 3


@dataclass(frozen=True)
class T5Architecture(Architecture):
    """The shape of the encoder of ProtT5 (Elnaggar et al. 2022, doi:10.1109/TPAMI.2021.3095381) and of ProstT5.

    Both have T5's 3B shape (Raffel et al. 2020, arXiv:1910.10683).
    """

    num_layers: int = 24
    hidden_dim: int = 1024
    num_heads: int = 32
    vocabulary: int = 128
    key_dim: int = 128  # of a head
    feed_forward_dim: int = 16_384
    buckets: int = 32  # of relative positions
    max_distance: int = 128  # from which on all keys share a bucket
    layer_vectors: ClassVar[int] = 2
    other_vectors: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buckets < 4 or self.buckets % 2:
            raise ValueError(f"buckets is {self.buckets}, not an even number from 4 on")
        if self.max_distance <= self.buckets // 4:  # so many distances each way have their own
            raise ValueError(f"max_distance is {self.max_distance}, which {self.buckets} buckets reach one by one")

    @property
    def family(self) -> Family:
        return PROSTT5 if self.vocabulary == T5_VOCABULARIES[PROSTT5] else PROTT5

    @property
    def head_dim(self) -> int:
        return self.key_dim

    @property
    def ffn_dim(self) -> int:
        return self.feed_forward_dim

    @property
    def num_parameters(self) -> int:
        return super().num_parameters + self.buckets * self.num_heads


T5_VOCABULARIES = {PROTT5: 128, PROSTT5: 150}


def model_flop(architecture: Architecture, lengths: "np.ndarray") -> float:
    """Return the floating-point operations of a forward over segments, only of matrix products and attention.

    A token costs 2 for each parameter of the layers' matrices: with L layers of hidden dimension d, 24 L d^2 (ESM-2) or
    32 L d^2 (DNABERT-S: 6 for qkv, 2 for out, 16 for the gated layer, 8 for the last). Attention adds 4 n w L in a
    segment of n tokens, for queries of width w = `inner_dim`. `lengths` (num_segments,) are the tokens in each, special
    tokens included.
    """
    lengths = lengths.astype(float)
    attention = 4 * architecture.num_layers * architecture.inner_dim
    return float((lengths * (2 * architecture.matrix_parameters + lengths * attention)).sum())
