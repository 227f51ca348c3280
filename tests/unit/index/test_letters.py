"""Nucleotide letters are kept, changed, counted, or refused; input that looks like the other kind."""

import random
import sys
from pathlib import Path

import pytest

from seqmill.errors import SeqmillError
from seqmill.index.fasta import FastaFile
from seqmill.index.letters import (
    NucleotideCounts,
    NucleotideLetters,
    ProteinLetters,
    looks_like_nucleotides,
    looks_like_protein,
)

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
