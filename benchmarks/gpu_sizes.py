"""How much the campaign on a GPU computes. GPU_CAMPAIGN=tiny in the environment is for a rehearsal on a CPU."""

import os
from dataclasses import dataclass

from seqmill.spec.architectures import Architecture, DnabertArchitecture, Esm2Architecture
from seqmill.spec.models import DNABERT_MODELS, MODELS
from seqmill.spec.packing import MAX_PACK_TOKENS

SMALL, FLAGSHIP, LARGE, DNABERT = "esm2_t6_8M_UR50D", "esm2_t33_650M_UR50D", "esm2_t36_3B_UR50D", "dnabert_s"


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how long."""

    models: dict[str, Architecture]  # the most important one first
    files: tuple[str, ...]  # models of the runs from FASTA to HDF5
    pack_tokens: int  # of the variants' packs, and of the peers' padded batches
    proteins: int  # for variants and peers
    contigs: int  # for DNABERT-S
    longest: int  # residues, or tokens of DNABERT-S
    round_seconds: float  # a round has as many packs as the default variant computes in this time
    peer_seconds: float  # likewise for a peer
    file_tokens: int  # in a run from FASTA to HDF5, at most
    file_seconds: float  # and as many as the model computes in this time
    hard_model: str  # of the second call
    hard_tokens: int
    hard_ranks: int
    hard_workers: int


FULL = Sizes(
    models={name: {**MODELS, **DNABERT_MODELS}[name] for name in (FLAGSHIP, LARGE, SMALL, DNABERT)},
    files=(FLAGSHIP, LARGE, SMALL, DNABERT),
    pack_tokens=MAX_PACK_TOKENS,
    proteins=8000,
    contigs=6000,
    longest=1022,
    round_seconds=2.0,
    peer_seconds=6.0,
    file_tokens=20_000_000,
    file_seconds=15.0,
    hard_model=FLAGSHIP,
    hard_tokens=3_000_000,
    hard_ranks=3,
    hard_workers=8,
)
TINY = Sizes(
    models={FLAGSHIP: Esm2Architecture(2, 64, 4), DNABERT: DnabertArchitecture(2, 64, 4)},
    files=(SMALL,),
    pack_tokens=1024,
    proteins=16,
    contigs=8,
    longest=300,
    round_seconds=0.05,
    peer_seconds=0.05,
    file_tokens=1500,
    file_seconds=1.0,
    hard_model=SMALL,
    hard_tokens=10_000,
    hard_ranks=2,
    hard_workers=2,
)
SIZES = TINY if os.environ.get("GPU_CAMPAIGN") == "tiny" else FULL
