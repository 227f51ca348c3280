"""One small model and one odd FASTA per model family, so that the suites run on all alike.

`EACH` has DNABERT-S twice: with whole contigs, and with windows on both strands. `ONE_EACH` has T5 once: ProtT5, whose
sequences have no token before them, in windows; ProstT5's have one.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import esm
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from dnabert_reference import reference_hidden, save_folder, seeded_state
from outputs_by_hand import blend_by_hand, spans_by_hand
from reference import fair_esm_hidden, fair_esm_model, save_checkpoint
from seqmill.index.bpe import BpeTokenizer
from seqmill.spec.architectures import DnabertArchitecture, Esm2Architecture, EsmcArchitecture, T5Architecture
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import UNTRAINED_TOKENIZER
from sequences import random_sequences

ODD_IDS = [
    "sp|P12345|TEST_HUMAN",
    "a/b/c",
    "../escape",
    "twice",
    "twice",
    "L" * 300,
    "Ünïcødé-蛋白",
    '"quoted"',
    "",
    "NA",
    ".",
    "twice",
    "contig-13",
    "14",
    "15",
]
# Sequences 6 and 9 are made equal to sequence 2.
RESIDUES = [5, 60, 60, 1, 300, 60, 1030, 2, 60, 700, 31, 1, 500, 640, 610]
BASES = [5, 60, 60, 1, 300, 60, 3000, 2, 60, 700, 31, 1, 1400, 2950, 601]
SMALL = DnabertArchitecture(num_layers=2, hidden_dim=64, num_heads=4)
# It has as many layers as the smallest released model, and heads of the same size.
SMALL_ESM2 = Esm2Architecture(num_layers=6, hidden_dim=64, num_heads=4)
SMALL_ESMC = EsmcArchitecture(num_layers=3, hidden_dim=128, num_heads=2)
SMALL_PROTT5 = T5Architecture(2, 64, 2, vocabulary=128, feed_forward_dim=128)
SMALL_PROSTT5 = replace(SMALL_PROTT5, vocabulary=150)
CYSTEINE = 23  # its token in ESM-2's alphabet
CYSTEINE_OF_T5 = 22
UNKNOWN = 0  # the token of N
COMPLEMENTS = dict(zip("ACGTRYSWKMBDHVN", "TGCAYRSWMKVHDBN", strict=True))

_folder = tempfile.TemporaryDirectory(prefix="seqmill-families-")


def random_contigs(lengths: list[int], seed: int = 13) -> list[str]:
    """Return seeded DNA of the given lengths; one letter in a hundred is an IUPAC code."""
    generator = np.random.default_rng(seed)
    letters, shares = list("ACGTNRY"), [0.25, 0.25, 0.245, 0.245, 0.004, 0.003, 0.003]
    return ["".join(generator.choice(letters, length, p=shares)) for length in lengths]


def write_fasta(path: Path, sequences: list[str]) -> Path:
    """Write sequences with the ids id0, id1 ..."""
    path.write_text("".join(f">id{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
    return path


def segments_written_out(sequence: str, policy: LengthPolicy) -> list[str]:
    """Return the segments of a clean nucleotide sequence that go through the model, in order."""
    segments = windows_written_out(sequence, policy)
    known = [segment for segment in segments if any(base in "ACGT" for base in segment)]
    return known or segments


def windows_written_out(sequence: str, policy: LengthPolicy) -> list[str]:
    """Return the windows of a clean nucleotide sequence on its strands, including those without a known base."""
    if policy.long_sequences == "truncate":
        sequence = sequence[: policy.max_length]
    # These are windows of the reverse complement, not reverse complements of the windows.
    other = "".join(COMPLEMENTS[base] for base in reversed(sequence))
    segments = []
    for strand in [sequence, other] if policy.strand == "both" else [sequence]:
        start, end = 0, policy.window if len(sequence) > policy.max_length and policy.window else len(sequence)
        segments.append(strand[start:end])
        while end < len(sequence):
            start, end = start + policy.stride, end + policy.stride
            segments.append(strand[start:end])
    return segments


def weights_of(segments: list[str]) -> list[int]:
    """Return the weights of a sequence's segments: their known bases, or all bases if none is known anywhere."""
    known = [sum(base in "ACGT" for base in segment) for segment in segments]
    return known if any(known) else [len(segment) for segment in segments]


@cache
def dnabert_state(architecture: DnabertArchitecture) -> dict[str, torch.Tensor]:
    return seeded_state(architecture)


@cache
def dnabert_folder(architecture: DnabertArchitecture = SMALL, name: str = "dnabert") -> Path:
    """Save seeded weights and the packaged tokenizer as a Hugging Face folder, once per process."""
    return save_folder(dnabert_state(architecture), architecture, Path(_folder.name) / name)


@dataclass(frozen=True)
class Family:
    """A model family with one policy.

    Attributes:
        name: for the names of tests.
        policy: how long sequences are treated.
        lengths: lengths of the `sequences`.
        hidden_dim: size of the embeddings.
    """

    name: str
    policy: LengthPolicy
    lengths: list[int]
    hidden_dim: int

    def __str__(self) -> str:
        return self.name

    @cached_property
    def sequences(self) -> list[str]:
        """Clean sequences for the `ODD_IDS`: several packs, some equal, some longer than max_length."""
        sequences = self.random(self.lengths)
        sequences[8] = sequences[5] = sequences[1]
        return sequences

    @property
    def longest(self) -> int:
        """The most letters of one sequence that enter the model."""
        return self.policy.max_length if self.policy.long_sequences == "truncate" else sys.maxsize

    def write_odd(self, folder: Path) -> Path:
        """Write `sequences` under `ODD_IDS`: every third in lower case, every fifth of DNA as RNA."""
        path = folder / f"odd ids of {self.name}.fasta"
        text = ""
        for number, (id_, sequence) in enumerate(zip(ODD_IDS, self.sequences, strict=True)):
            sequence = sequence.lower() if number % 3 == 2 else sequence
            sequence = sequence.replace("T", "U") if number % 5 == 3 and not self.is_protein else sequence
            text += f">{id_ and id_ + ' some words'}\n{sequence}\n"
        path.write_text(text, encoding="utf-8")
        return path

    # The families differ in these:

    is_protein: ClassVar[bool] = True
    reference: ClassVar[str]  # how the name of the audit's reference begins

    @property
    def model(self) -> str:
        """A fast model, by the name that a user would give."""
        raise NotImplementedError

    @property
    def seeded_model(self) -> str:
        """The model that `expected` uses."""
        raise NotImplementedError

    def random(self, lengths: list[int]) -> list[str]:
        """Return seeded sequences of the given lengths."""
        raise NotImplementedError

    def expected(self, sequence: str, pooling: str) -> np.ndarray:
        """Return the embedding of `seeded_model`, computed by the reference from the clean letters."""
        raise NotImplementedError


class Proteins(Family):
    before: ClassVar[int] = 1  # special tokens before the residues; there is one after them

    def random(self, lengths: list[int]) -> list[str]:
        return random_sequences(lengths)

    def expected(self, sequence: str, pooling: str) -> np.ndarray:
        hidden = self.blended(sequence)
        return {"mean": hidden[self.before : -1].mean(axis=0), "cls": hidden[0]}[pooling]

    def blended(self, sequence: str, layer: int = -1) -> np.ndarray:
        """Return a layer's hidden states, blended over windows, special tokens included."""
        spans = spans_by_hand(len(sequence[: self.longest]), self.policy)
        return blend_by_hand(spans, [self.hidden(sequence[begin:end], layer) for begin, end in spans], self.before)

    def hidden(self, residues: str, layer: int) -> np.ndarray:
        """Return a layer's hidden states, special tokens included, by the reference."""
        raise NotImplementedError


class ByFairEsm(Proteins):
    reference = "fair-esm"

    @property
    def model(self) -> str:
        return str(_esm2_checkpoint())

    seeded_model = model

    def hidden(self, residues: str, layer: int) -> np.ndarray:
        assert layer == -1
        return fair_esm_hidden(_esm2(), residues)


class EsmC(Proteins):
    reference = "ESM C written out"
    embedding, cysteine = "embed_tokens.weight", CYSTEINE

    @property
    def model(self) -> str:
        return str(_saved(_esmc(), "esmc"))

    seeded_model = model

    def hidden(self, residues: str, layer: int) -> np.ndarray:
        from esmc_reference import reference_hidden, tokens_of

        return reference_hidden(_esmc(), tokens_of(residues))[layer].numpy()


class ProtT5(Proteins):
    reference = "ProtT5 written out"
    embedding, cysteine = "shared.weight", CYSTEINE_OF_T5
    before = 0
    architecture: ClassVar[T5Architecture] = SMALL_PROTT5

    @property
    def model(self) -> str:
        return str(_saved(_t5(self.architecture), type(self).__name__))

    seeded_model = model

    def hidden(self, residues: str, layer: int) -> np.ndarray:
        from t5_reference import reference_hidden, tokens_of

        return reference_hidden(_t5(self.architecture), tokens_of(residues, self.architecture))[layer].numpy()


class ProstT5(ProtT5):
    reference = "ProstT5 written out"
    before = 1
    architecture = SMALL_PROSTT5


class Nucleotides(Family):
    is_protein = False
    reference = "DNABERT-S written out"

    @property
    def model(self) -> str:
        return str(dnabert_folder())

    seeded_model = model

    def random(self, lengths: list[int]) -> list[str]:
        return random_contigs(lengths)

    def expected(self, sequence: str, pooling: str) -> np.ndarray:
        segments = segments_written_out(sequence, self.policy)
        tokenizer = BpeTokenizer.from_file(UNTRAINED_TOKENIZER)
        total = np.zeros(self.hidden_dim)
        for segment, weight in zip(segments, weights_of(segments), strict=True):
            tokens, _ = tokenizer.encode([segment.encode()])
            (hidden,) = reference_hidden(dnabert_state(SMALL), SMALL, [tokens], torch.float32)
            pooled = {"mean": hidden.mean(dim=0), "mean_tokens": hidden[1:-1].mean(dim=0), "cls": hidden[0]}[pooling]
            total += weight * pooled.numpy()
        return total / sum(weights_of(segments))


@cache
def _esm2() -> esm.ESM2:
    return fair_esm_model(SMALL_ESM2)


@cache
def _esm2_checkpoint() -> Path:
    return save_checkpoint(_esm2(), Path(_folder.name) / "esm2.pt")


@cache
def _esmc() -> Any:
    from esmc_reference import seeded_model

    return seeded_model(SMALL_ESMC)


@cache
def _t5(architecture: T5Architecture) -> Any:
    from t5_reference import seeded_model

    return seeded_model(architecture)


@cache
def _saved(model: Any, name: str) -> Path:
    """Save a model of transformers as a Hugging Face folder, once per process."""
    model.save_pretrained(Path(_folder.name) / name)
    return Path(_folder.name) / name


PROTEINS = ByFairEsm("proteins", LengthPolicy("truncate", 1022), RESIDUES, SMALL_ESM2.hidden_dim)
CONTIGS = Nucleotides("contigs", LengthPolicy("truncate", 2000), BASES, SMALL.hidden_dim)
# The windows overlap: a contig of 601 bases has two, one of 3,000 has ten.
WINDOWS = Nucleotides("windows", LengthPolicy("window", 600, 500, 300, "both"), BASES, SMALL.hidden_dim)
ESMC = EsmC("esmc", LengthPolicy("truncate", 1022), RESIDUES, SMALL_ESMC.hidden_dim)
PROTT5 = ProtT5("prott5", LengthPolicy("window", 600, 500, 300), RESIDUES, SMALL_PROTT5.hidden_dim)
PROSTT5 = ProstT5("prostt5", LengthPolicy("truncate", 1022), RESIDUES, SMALL_PROSTT5.hidden_dim)
EACH = (PROTEINS, CONTIGS, WINDOWS, ESMC, PROTT5, PROSTT5)
ONE_EACH = (PROTEINS, WINDOWS, ESMC, PROTT5)
# For long suites of what is saved, in which ESM-2 and ESM C differ in nothing.
EACH_KIND = (WINDOWS, ESMC, PROTT5)


def changed_model(family: Proteins, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    """Return a copy of a Hugging Face folder of ESM C or T5, with changed tensors."""
    saved = Path(shutil.copytree(family.model, folder / "weights"))
    state = load_file(saved / "model.safetensors")
    change(state)
    save_file(state, saved / "model.safetensors", metadata={"format": "pt"})
    return str(saved)


def broken_model(family: Family, folder: Path, value: float) -> str:
    """Return weights whose embedding of cysteine, or of N, is NaN or infinite."""
    if family is PROTEINS:
        model = fair_esm_model(SMALL_ESM2)
        with torch.no_grad():
            model.embed_tokens.weight[CYSTEINE] = value
        return str(save_checkpoint(model, folder / "weights.pt"))
    if isinstance(family, EsmC | ProtT5):

        def break_cysteine(state: dict[str, torch.Tensor]) -> None:
            state[family.embedding][family.cysteine] = value

        return changed_model(family, folder, break_cysteine)
    state = seeded_state(SMALL)
    state["embeddings.word_embeddings.weight"][UNKNOWN] = value
    return str(save_folder(state, SMALL, folder / "weights"))
