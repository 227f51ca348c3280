"""Each demo contig matches the plasmid at the position in its description."""

import re
from pathlib import Path

import pytest

from cut_contigs import write_contigs
from seqmill.index.fasta import FastaFile, FastaRecord
from seqmill.index.segments import reverse_complement

DATA = Path(__file__).parents[1] / "data"
PLASMID, CONTIGS = DATA / "NC_005816.fna", DATA / "NC_005816.contigs.fna"
DESCRIPTION = re.compile(r"(\d+)-(\d+) ([+-])( soft-masked| with a gap| duplicate of \d{3})?")


def records(path: Path) -> list[FastaRecord]:
    return [record for block in FastaFile(path).blocks() for record in block]


def bases(record: FastaRecord) -> bytes:
    return record.body.translate(None, b"\n")


@pytest.fixture(scope="module")
def contigs() -> list[FastaRecord]:
    return records(CONTIGS)


def test_the_script_makes_the_committed_file(tmp_path: Path) -> None:
    output = tmp_path / "contigs.fna"
    write_contigs(PLASMID, output)
    assert output.read_bytes() == CONTIGS.read_bytes()


def test_the_demo_is_small(contigs: list[FastaRecord]) -> None:
    lengths = [len(bases(contig)) for contig in contigs]
    assert 40 <= len(lengths) <= 60
    assert 40_000 <= sum(lengths) <= 60_000
    assert min(lengths) < 200
    assert max(lengths) > 3000
    assert [contig.id for contig in contigs] == [
        f"NC_005816.1_contig_{number:03}" for number in range(1, len(contigs) + 1)
    ]


def test_every_contig_matches_the_plasmid_at_its_position(contigs: list[FastaRecord]) -> None:
    plasmid = bases(records(PLASMID)[0])
    strands = set()
    for contig in contigs:
        start, end, strand, _ = DESCRIPTION.fullmatch(contig.description).groups()
        piece = plasmid[int(start) - 1 : int(end)]
        expected = piece if strand == "+" else reverse_complement(piece)
        found = bases(contig).upper()
        assert len(found) == len(expected)
        assert {base for base, known in zip(found, expected, strict=True) if base != known} <= {ord("N")}
        strands.add(strand)
    assert strands == {"+", "-"}


def test_one_is_a_duplicate_one_has_n_and_one_is_in_lower_case(contigs: list[FastaRecord]) -> None:
    by_note = {contig.description.partition(" ")[2][2:].split(" ")[0]: contig for contig in contigs}
    assert set(by_note) == {"", "soft-masked", "with", "duplicate"}
    original = contigs[int(by_note["duplicate"].description[-3:]) - 1]
    assert bases(original) == bases(by_note["duplicate"])
    assert len({bases(contig).upper() for contig in contigs}) == len(contigs) - 1
    assert [contig for contig in contigs if b"N" in bases(contig).upper()] == [by_note["with"]]
    assert bases(by_note["with"]).count(b"N") == 5
    assert [contig for contig in contigs if bases(contig).islower()] == [by_note["soft-masked"]]
    assert all(bases(contig).isupper() for contig in contigs if contig is not by_note["soft-masked"])


def test_another_seed_and_coverage_give_other_contigs(tmp_path: Path) -> None:
    output = tmp_path / "contigs.fna"
    write_contigs(PLASMID, output, coverage=2, seed=7)
    total = sum(len(bases(contig)) for contig in records(output))
    assert 2 * 9609 <= total < 2 * 9609 + 2 * 5000  # up to one more contig, and the duplicate
