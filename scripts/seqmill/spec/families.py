"""The model families: what a model of each reads, and how its tokens frame a sequence. Imports no torch.

A family has one tokenizer, one forward pass, and one reference; `seqmill.model.families` has its implementation.
"""

from dataclasses import dataclass

from seqmill.errors import SeqmillError


@dataclass(frozen=True)
class Family:
    """Facts about a family that hold for all its models."""

    name: str  # in files
    title: str  # for messages
    long_sequences: str  # how long sequences are treated by default, see `seqmill.spec.lengths`
    max_length: int  # the default, in letters
    is_protein: bool = True
    before: int = 1  # special tokens before the sequence
    after: int = 1  # special tokens after it
    has_cls: bool = True  # whether the first token's vector stands for the whole sequence
    letters_per_token: int = 1  # about
    precisions: tuple[str, ...] = ("bfloat16", "float16", "float32")
    why_no_float16: str = ""

    def require_precision(self, precision: str) -> None:
        """Raise a SeqmillError if models of this family can't be computed in a precision; auto is always possible."""
        if precision not in (*self.precisions, "auto"):
            reason = self.why_no_float16 if precision == "float16" else f"it has no kernels in {precision}"
            possible = f"auto, {', '.join(self.precisions[:-1])}, or {self.precisions[-1]}"
            raise SeqmillError(f"precision {precision} is not for {self.title}: {reason}; use {possible}")


WITH_FLOAT8 = ("bfloat16", "float16", "float32", "float8")
# ESM-2 was trained on 1,022 residues, ESM C on 2,048 tokens. DNABERT-S was trained on 2,000 tokens, about 10,000 bases,
# and a contig's embedding should cover all of it. T5's positions have no limit; UniProt embeds up to 12,000 residues.
ESM2 = Family("esm2", "ESM-2", "truncate", 1022, precisions=WITH_FLOAT8)
DNABERT_S = Family(
    "dnabert_s", "DNABERT-S", "window", 10_000, is_protein=False, letters_per_token=4, precisions=WITH_FLOAT8
)
ESMC = Family("esmc", "ESM C", "truncate", 2046)
NO_FLOAT16 = "T5's feed-forward can overflow in float16"
PROTT5 = Family(
    "prott5",
    "ProtT5",
    "truncate",
    12_000,
    before=0,
    has_cls=False,
    precisions=("bfloat16", "float32"),
    why_no_float16=NO_FLOAT16,
)
PROSTT5 = Family(
    "prostt5",
    "ProstT5",
    "truncate",
    12_000,
    has_cls=False,
    precisions=("bfloat16", "float32"),
    why_no_float16=NO_FLOAT16,
)
FAMILIES = {family.name: family for family in (ESM2, DNABERT_S, ESMC, PROTT5, PROSTT5)}


def family_of_tokenizer(name: str) -> Family:
    """Return the family whose tokenizer a result names: proteins' have their family's name, byte pairs a digest.

    Raise a SeqmillError if no family has it.
    """
    if name.startswith("bpe"):
        return DNABERT_S
    if name not in FAMILIES:
        raise SeqmillError(f"tokenizer {name!r}: no family has it; the results are damaged, or of a newer version")
    return FAMILIES[name]
