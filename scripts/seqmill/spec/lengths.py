"""The length policy: how long sequences are treated. Needs only the standard library."""

from dataclasses import dataclass

from seqmill.errors import SeqmillError
from seqmill.spec.families import Family

FAMILY_DEFAULT = "auto"  # as a setting: the default of the model family
LONG_SEQUENCES = ("truncate", "window", "full", "reject")
STRANDS = ("forward", "both")
MAX_MAX_LENGTH = 1_000_000
MAX_OVERLAP = 64  # windows that contain the same letter


@dataclass(frozen=True)
class LengthPolicy:
    """How sequences are treated. Lengths are in residues or bases."""

    long_sequences: str = "truncate"  # those longer than `max_length`: truncate, window, full (no limit), or reject
    max_length: int = 1022  # 0 for full
    window: int = 0  # length of a window; 0 without windows
    stride: int = 0  # distance between the starts of two windows; 0 without windows
    strand: str = "forward"  # or both, for the mean of a nucleotide sequence and its reverse complement

    @property
    def copies(self) -> float:
        """How often a letter goes through the model, at most: once per strand and overlapping window."""
        overlapping = self.window / self.stride if self.window else 1
        return overlapping * (2 if self.strand == "both" else 1)

    def __post_init__(self) -> None:
        if self.long_sequences not in LONG_SEQUENCES:
            raise SeqmillError(f"long_sequences must be one of {', '.join(LONG_SEQUENCES)}, not {self.long_sequences}")
        if self.strand not in STRANDS:
            raise SeqmillError(f"strand must be one of {', '.join(STRANDS)}, not {self.strand}")
        if self.long_sequences == "full":
            _require("max_length", self.max_length, 0, 0, "because long_sequences: full has no limit")
        else:
            _require("max_length", self.max_length, 1, MAX_MAX_LENGTH, "residues or bases")
        if self.long_sequences == "window":
            if self.stride >= 1 and self.window > MAX_OVERLAP * self.stride:
                raise SeqmillError(
                    f"stride must be at least a {MAX_OVERLAP}th of the window of {self.window}, not {self.stride}: "
                    "each letter is computed once for every window that contains it"
                )
            _require("window", self.window, 1, self.max_length, "residues or bases, no longer than max_length")
            _require("stride", self.stride, 1, self.window, "residues or bases, no longer than the window")
        else:
            _require("window", self.window, 0, 0, "without windows")
            _require("stride", self.stride, 0, 0, "without windows")


def choose_length_policy(
    family: Family,
    long_sequences: str = FAMILY_DEFAULT,
    max_length: int | str = FAMILY_DEFAULT,
    window: int | str = FAMILY_DEFAULT,
    stride: int | str = FAMILY_DEFAULT,
    strand: str = "forward",
) -> LengthPolicy:
    """Return the policy for these settings; auto means the default of the model family.

    With long_sequences auto, a window or a stride selects windows. `strand` is ignored for proteins. Raise a
    SeqmillError if a setting is out of range, or unused with these other settings.
    """
    usual, usual_length = family.long_sequences, family.max_length
    if long_sequences == FAMILY_DEFAULT:
        long_sequences = usual if window == stride == FAMILY_DEFAULT else "window"
    if long_sequences == "full":
        _require_auto(long_sequences, max_length=max_length)
        max_length = 0
    if long_sequences != "window":
        _require_auto(long_sequences, window=window, stride=stride)
        window = stride = 0
    if max_length == FAMILY_DEFAULT:
        max_length = window or usual_length if window != FAMILY_DEFAULT else usual_length
    if window == FAMILY_DEFAULT:
        window = max_length
    if stride == FAMILY_DEFAULT:  # windows of a protein overlap, so that every residue is well inside one
        stride = -(-int(window) // 2) if family.is_protein else window
    strand = "forward" if family.is_protein else strand
    return LengthPolicy(long_sequences, int(max_length), int(window), int(stride), strand)


def _require_auto(long_sequences: str, **settings: int | str) -> None:
    for name, value in settings.items():
        if value not in (FAMILY_DEFAULT, 0):
            remedy = "omit it" if name == "max_length" else "set long_sequences to window, or omit it"
            raise SeqmillError(f"{name} is {value}, but long_sequences: {long_sequences} does not use it; {remedy}")


def _require(name: str, value: int, least: int, most: int, what: str) -> None:
    if not least <= value <= most:
        wanted = f"{least} to {most}" if least < most else str(least)
        raise SeqmillError(f"{name} must be {wanted} {what}, not {value}")
