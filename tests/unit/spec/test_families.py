"""Families: precisions that they have, and how a result names one."""

import pytest

from seqmill.errors import SeqmillError
from seqmill.spec.families import DNABERT_S, FAMILIES, Family, family_of_tokenizer


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_a_result_names_its_family_by_the_tokenizer(family: Family) -> None:
    name = "bpe 0123abcd" if family == DNABERT_S else family.name
    assert family_of_tokenizer(name) == family


def test_a_tokenizer_of_no_family_is_an_error() -> None:
    """Taken for nucleotides, the vectors of a newer version's proteins could be reused for contigs."""
    with pytest.raises(SeqmillError, match=r"tokenizer 'esm9': no family has it"):
        family_of_tokenizer("esm9")


@pytest.mark.parametrize(("name", "precision"), [("prott5", "float16"), ("prostt5", "float8"), ("esmc", "float8")])
def test_a_precision_that_a_family_lacks_is_refused(name: str, precision: str) -> None:
    family = FAMILIES[name]
    with pytest.raises(SeqmillError, match=rf"precision {precision} is not for {family.title}: .*; use auto, bfloat16"):
        family.require_precision(precision)
    for possible in ("auto", *family.precisions):
        family.require_precision(possible)
