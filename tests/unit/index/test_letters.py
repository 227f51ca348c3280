"""Letters are kept, changed, counted, or refused, by the model family; input that looks like the other kind."""

import random
import sys
from pathlib import Path

import pytest

from seqmill.errors import SeqmillError
from seqmill.index.fasta import FastaFile
from seqmill.index.invalid import InvalidRecords
from seqmill.index.letters import (
    ALPHABETS,
    LetterCounts,
    NucleotideCounts,
    NucleotideLetters,
    ProteinLetters,
    T5LetterCounts,
    looks_like_nucleotides,
    looks_like_protein,
)
from seqmill.index.tokens import ProteinTokenizer
from seqmill.spec.families import ESM2, ESMC, PROSTT5, PROTT5, Family
from seqmill.spec.lengths import LengthPolicy, choose_length_policy

DATA = Path(__file__).parents[2] / "data"
IUPAC = b"ACGTRYSWKMBDHVN"


def cleaned(body: bytes) -> tuple[bytes, NucleotideCounts]:
    letters = NucleotideLetters()
    return letters.clean(body), letters.counts


def refusal(body: bytes) -> str:
    with pytest.raises(SeqmillError) as caught:
        NucleotideLetters().clean(body)
    return str(caught.value)


def bodies(name: str) -> list[bytes]:
    return [record.body for block in FastaFile(DATA / name).blocks() for record in block]


@pytest.mark.parametrize(
    ("body", "bases", "counts"),
    [
        (b"ACGT", b"ACGT", NucleotideCounts()),
        (b"AC\r\nGT\r\n", b"ACGT", NucleotideCounts()),
        (b" A\tC\vG\fT \n", b"ACGT", NucleotideCounts()),
        (b"acgT\n", b"ACGT", NucleotideCounts(lower_case=3)),
        (b"ACGU\nuu", b"ACGTTT", NucleotideCounts(lower_case=2, u_to_t=3)),
        (b"NnACGT", b"NNACGT", NucleotideCounts(lower_case=1, n=2)),
        (IUPAC, IUPAC, NucleotideCounts(n=1, other_iupac=10)),
        (b"ryuN", b"RYTN", NucleotideCounts(lower_case=3, u_to_t=1, n=1, other_iupac=2)),
        (b"N" * 50, b"N" * 50, NucleotideCounts(n=50)),
    ],
)
def test_bases_and_counts(body: bytes, bases: bytes, counts: NucleotideCounts) -> None:
    assert cleaned(body) == (bases, counts)


def test_counts_are_over_all_records() -> None:
    letters = NucleotideLetters()
    for body in (b"acN", b"ACGT", b"UUR"):
        letters.clean(body)
    assert letters.counts == NucleotideCounts(lower_case=2, u_to_t=2, n=1, other_iupac=1)


def test_every_byte_is_kept_ignored_or_refused() -> None:
    kept, ignored = set(IUPAC + IUPAC.lower() + b"Uu"), set(b" \t\r\n\v\f")
    for byte in range(256):
        body = b"AC" + bytes([byte]) + b"GT"
        if byte in kept:
            assert cleaned(body)[0] == b"AC" + bytes([byte]).upper().replace(b"U", b"T") + b"GT"
        elif byte in ignored:
            assert cleaned(body)[0] == b"ACGT"
        else:
            assert "at base 3 is not a nucleotide letter" in refusal(body)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", ["it has no sequence; remove it"]),
        (b"\n \r\n", ["it has no sequence; remove it"]),
        (b"ACGT\nAC-GT", ["'-' at base 7", "looks like an alignment"]),
        (b"ACGT.", ["'.' at base 5", "looks like an alignment"]),
        (b"1 ACGT", ["'1' at base 1", "remove numbers"]),
        (b"ACGT*", ["'*' at base 5"]),
        (b"acgtMKVl", ["'l' at base 8", "looks like a protein", "use a protein model"]),
        (b"ACXGT", ["'X' at base 3", "write N", "use a protein model"]),
        (b"AC\xc3\xa9", ["byte 0xc3 at base 3"]),
        (b"AC\0", ["byte 0x00 at base 3"]),
    ],
)
def test_refusals_name_letter_position_and_remedy(body: bytes, told: list[str]) -> None:
    message = refusal(body)
    assert [part for part in told if part not in message] == []
    assert "\n" not in message


def test_only_protein_letters_get_the_hint_about_proteins() -> None:
    hinted = {chr(byte) for byte in range(128) if byte not in b" \t\r\n\v\f" + IUPAC + IUPAC.lower() + b"Uu"}
    hinted = {letter for letter in hinted if "use a protein model" in refusal(letter.encode())}
    assert hinted == set("EFILPQJOXZ" + "efilpqjoxz")


def test_refusals_of_proteins_count_residues() -> None:
    with pytest.raises(SeqmillError, match=r"^'-' at residue 3 is not an amino-acid letter: this looks like an align"):
        ProteinLetters().tokens(b"MK-V")


PROTEIN_FAMILIES = [ESM2, ESMC, PROTT5, PROSTT5]
# From the published vocabularies: fair-esm's ESM-1b alphabet, and ProtT5's SentencePiece model.
IDS = {ESM2: "LAGVSERTIDPKQNFYMHWCXBUZO", PROTT5: "ALGVSREDTIPKFQNYMHWCX"}
FIRST = {ESM2: 4, PROTT5: 3}
SPECIAL = {ESM2: ([0], [2]), ESMC: ([0], [2]), PROTT5: ([], [1]), PROSTT5: ([149], [1])}


@pytest.mark.parametrize("family", PROTEIN_FAMILIES)
def test_the_tokens_of_every_byte_by_family(family: Family) -> None:
    like = ESM2 if family in (ESM2, ESMC) else PROTT5
    ids = {letter: token for token, letter in enumerate(IDS[like], start=FIRST[like])}
    unknown = "J*" if like == ESM2 else "J*UZOB"  # the authors of ProtT5 replace U, Z, O, and B
    for byte in range(256):
        letter, body = chr(byte).upper() if byte < 128 else "", b"M" + bytes([byte]) + b"K"
        letters = ProteinLetters(ALPHABETS[family])
        if letter in ids or (letter and letter in unknown):
            assert list(letters.tokens(body)) == [ids["M"], ids.get(letter, ids["X"]), ids["K"]], letter
        elif byte in b" \t\r\n\v\f":
            assert list(letters.tokens(body)) == [ids["M"], ids["K"]]
        else:
            with pytest.raises(SeqmillError, match="at residue 2 is not an amino-acid letter"):
                letters.tokens(body)


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        (ESM2, LetterCounts(lower_case=3, trailing_stop=1, inner_stop_to_x=1, j_to_x=2)),
        (ESMC, LetterCounts(lower_case=3, trailing_stop=1, inner_stop_to_x=1, j_to_x=2)),
        (PROTT5, T5LetterCounts(lower_case=3, trailing_stop=1, inner_stop_to_x=1, j_to_x=2, uzob_to_x=5)),
        (PROSTT5, T5LetterCounts(lower_case=3, trailing_stop=1, inner_stop_to_x=1, j_to_x=2, uzob_to_x=5)),
    ],
)
def test_changes_of_residues_are_counted_over_all_records(family: Family, counts: LetterCounts) -> None:
    letters = ProteinLetters(ALPHABETS[family])
    for body in (b"MKV", b"mUZ*K\nj*", b"JOBu"):
        letters.tokens(body)
    assert letters.counts == counts


def tokenized(sequence: bytes, family: Family, policy: LengthPolicy | None = None) -> tuple[list[int], list[int]]:
    """Return a sequence's tokens and the weights of its segments."""
    tokenizer = ProteinTokenizer(family, policy or choose_length_policy(family))
    found = tokenizer.tokens([ProteinLetters(ALPHABETS[family]).tokens(sequence)])
    return list(found.tokens), found.segment_lengths.tolist()


@pytest.mark.parametrize("family", PROTEIN_FAMILIES)
def test_special_tokens_frame_every_segment(family: Family) -> None:
    """ProtT5 has only an end, which does not count; ProstT5 has a prefix for amino acids."""
    before, after = SPECIAL[family]
    assert (family.before, family.after) == (len(before), len(after))
    residues = list(ProteinLetters(ALPHABETS[family]).tokens(b"MKVLA"))
    assert tokenized(b"MKVLA", family) == ([*before, *residues, *after], [5])
    assert tokenized(b"M", family) == ([*before, residues[0], *after], [1])
    cut = LengthPolicy("truncate", 2)
    assert tokenized(b"MKVLA", family, cut) == ([*before, *residues[:2], *after], [2])
    windows = LengthPolicy("window", 3, 3, 2)
    framed = [*before, *residues[:3], *after, *before, *residues[2:], *after]
    assert tokenized(b"MKVLA", family, windows) == (framed, [3, 3])


@pytest.mark.parametrize("family", PROTEIN_FAMILIES)
def test_nucleotides_are_refused_for_every_protein_family(family: Family) -> None:
    tokenizer = ProteinTokenizer(family, choose_length_policy(family))
    records = [record for block in FastaFile(DATA / "NC_005816.contigs.fna").blocks() for record in block]
    with pytest.raises(SeqmillError, match=r"^contigs.fna: .* this looks like nucleotides, and the model is for prot"):
        tokenizer.clean(records[:5], "contigs.fna", InvalidRecords())


def test_letter_policies_keep_their_words() -> None:
    """They go into the digest of an index."""
    esm2 = "upper-case; strip one trailing *; J and inner * to X; refuse gaps and all else"
    t5 = "upper-case; strip one trailing *; J, U, Z, O, B, and inner * to X; refuse gaps and all else"
    assert {family.name: alphabet.policy for family, alphabet in ALPHABETS.items()} == {
        "esm2": esm2,
        "esmc": esm2,
        "prott5": t5,
        "prostt5": t5,
    }


def test_genomes_look_like_nucleotides_and_proteins_do_not() -> None:
    contigs, proteins = bodies("NC_005816.contigs.fna"), bodies("NC_000932.faa")
    assert looks_like_nucleotides(b"".join(contigs))
    assert looks_like_nucleotides(b"".join(contigs).replace(b"T", b"U").replace(b"t", b"u"))
    assert [body for body in contigs if len(body) > 210 and not looks_like_nucleotides(body)] == []
    assert [body for body in proteins if looks_like_nucleotides(body)] == []
    assert not looks_like_nucleotides(b"".join(proteins))


@pytest.mark.parametrize(
    ("letters", "nucleotides"),
    [
        (b"ACGT" * 50, True),
        (b"ACGT" * 49 + b"ACG", False),  # 199 letters
        (b"ACGT" * 49 + b"ACG\n \n", False),
        (b"acguN" * 40, True),
        (b"A" * 196 + b"RYKM", True),  # 2 % of 200
        (b"A" * 195 + b"RYKML", False),
        (b"GAGAGS" * 40, False),  # silk fibroin
        (b"AATAATAATAATPATAATAATAATPA" * 10, False),  # an antifreeze protein
    ],
)
def test_limits_of_looking_like_nucleotides(letters: bytes, nucleotides: bool) -> None:
    assert looks_like_nucleotides(letters) is nucleotides


def test_proteins_of_nucleotide_letters_look_like_protein_and_genomes_do_not() -> None:
    residues = b"".join(bodies("NC_000932.faa"))
    legal = residues.translate(None, b"EFILPQ")  # letters that NucleotideLetters would accept
    NucleotideLetters().clean(legal)
    assert looks_like_protein(legal)
    assert looks_like_protein(residues)
    assert all(looks_like_protein(legal[start : start + 500]) for start in range(0, len(legal) - 500, 500))
    assert [body for body in bodies("NC_005816.contigs.fna") if looks_like_protein(body)] == []


@pytest.mark.parametrize(
    ("letters", "protein"),
    [
        (b"N" * 1000, False),
        (b"N" * 1000 + b"ACGT" * 5, False),
        (b"n" * 1000 + b"MKVDSRHWKMSVDRKHSMVRD", True),  # N does not count
        (b"MKVDSRHWKMSVDRKHSMV", False),  # 19 letters
        (b"ACGUACGUACGURYKMRYKM", False),  # a degenerate consensus
        (b"RYKMRYKMRYKACGTACGTA", True),  # 9 of 20
        (b"RYKMRYKMRYACGTACGTAC", False),  # 10 of 20
    ],
)
def test_limits_of_looking_like_protein(letters: bytes, protein: bool) -> None:
    assert looks_like_protein(letters) is protein


def test_python_does_not_loop_over_bases() -> None:
    body = random.Random(3).randbytes(200_000).translate(b"ACGTacgtNnRyUuKm" * 16)
    steps = 0

    def count(frame: object, event: str, argument: object) -> object:
        nonlocal steps
        steps += 1  # calls and lines
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        NucleotideLetters().clean(body)
    finally:
        sys.settrace(before)
    assert 5 < steps < 100
