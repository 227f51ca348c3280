"""The length policy: what is done with sequences longer than a model takes whole. Light: standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from seqmill.errors import SeqmillError
from seqmill.spec.models import DNABERT_S, ESM2

AUTO = "auto"
LONG_SEQUENCES = ("truncate", "window", "full", "reject")
STRANDS = ("forward", "both")
MAX_MAX_LENGTH = 1_000_000
MAX_OVERLAP = 64  # windows over a letter
# ESM-2 was trained on 1022 residues; DNABERT-S on 2,000 tokens, which are about 10,000 bases, and a contig's
# embedding should be of all of it.
DEFAULTS = {ESM2: ("truncate", 1022), DNABERT_S: ("window", 10_000)}


@dataclass(frozen=True)
class LengthPolicy:
    """What becomes of a sequence.

    Attributes:
        long_sequences: of those longer than `max_length`: truncate, embed in windows or in full, or
            reject the record.
        max_length: in residues or bases; 0, no limit, goes with full.
        window, stride: of windows, in residues or bases: how long each is, and how far it begins after the one
            before; 0 without windows.
        strand: forward, or both: the mean of a nucleotide sequence and its reverse complement.
    """

    long_sequences: str = "truncate"
    max_length: int = 1022
    window: int = 0
    stride: int = 0
    strand: str = "forward"

    @property
    def copies(self) -> float:
        """How often a letter goes through the model, at most: on each strand, in windows that overlap."""
        overlapping = self.window / self.stride if self.window else 1
        return overlapping * (2 if self.strand == "both" else 1)

    def __post_init__(self) -> None:
        if self.long_sequences not in LONG_SEQUENCES:
            raise SeqmillError(f"long_sequences must be one of {', '.join(LONG_SEQUENCES)}, not {self.long_sequences}")
        if self.strand not in STRANDS:
            raise SeqmillError(f"strand must be one of {', '.join(STRANDS)}, not {self.strand}")
        if self.long_sequences == "full":
            _require("max_length", self.max_length, 0, 0, "without a limit, as long_sequences is full")
        else:
            _require("max_length", self.max_length, 1, MAX_MAX_LENGTH, "residues or bases")
        if self.long_sequences == "window":
            if self.stride >= 1 and self.window > MAX_OVERLAP * self.stride:
                raise SeqmillError(
                    f"stride must be at least a {MAX_OVERLAP}th of the window of {self.window}, not {self.stride}: "
                    "each letter would be computed as often as windows hold it"
                )
            _require("window", self.window, 1, self.max_length, "residues or bases, no longer than max_length")
            _require(
                "stride",
                self.stride,
                1,
                self.window,
                "residues or bases, no longer than the window, so that none is left out",
            )
        else:
            _require("window", self.window, 0, 0, "without windows")
            _require("stride", self.stride, 0, 0, "without windows")


def choose_length_policy(
    family: str,
    long_sequences: str = AUTO,
    max_length: int | str = AUTO,
    window: int | str = AUTO,
    stride: int | str = AUTO,
    strand: str = "forward",
) -> LengthPolicy:
    """Return the policy that the settings ask for, auto being what suits the family of models.

    A window or a stride means windows, where long_sequences is auto. `strand` is of nucleotides and does not concern
    proteins.

    Raises:
        SeqmillError: a setting is out of its range, or without use beside the others.
    """
    usual, usual_length = DEFAULTS[family]
    if long_sequences == AUTO:
        long_sequences = usual if window == stride == AUTO else "window"
    if long_sequences == "full":
        _require_auto(long_sequences, max_length=max_length)
        max_length = 0
    if long_sequences != "window":
        _require_auto(long_sequences, window=window, stride=stride)
        window = stride = 0
    if max_length == AUTO:
        max_length = window or usual_length if window != AUTO else usual_length
    if window == AUTO:
        window = max_length
    if stride == AUTO:  # the windows of a protein overlap, for each residue to be well inside of one
        stride = window if family == DNABERT_S else -(-window // 2)
    return LengthPolicy(
        long_sequences, int(max_length), int(window), int(stride), strand if family == DNABERT_S else "forward"
    )


def _require_auto(long_sequences: str, **settings: int | str) -> None:
    for name, value in settings.items():
        if value not in (AUTO, 0):
            other = "; set long_sequences to window, or leave it away" if name != "max_length" else "; leave it away"
            raise SeqmillError(f"{name} is {value}, but has no use where long_sequences is {long_sequences}{other}")


def _require(name: str, value: int, least: int, most: int, what: str) -> None:
    if not least <= value <= most:
        wanted = f"{least} to {most}" if least < most else str(least)
        raise SeqmillError(f"{name} must be {wanted} {what}, not {value}")
