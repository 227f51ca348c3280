"""The launches, bytes, and FLOP of a layer stay what launches.json says."""

import json

import pytest

from count_launches import TABLE, WAYS, count
from fake_models import Way
from seqmill.spec.models import MODELS

EXPECTED = json.loads(TABLE.read_text())


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_pack_costs_what_the_table_says(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change that is meant: python tests/rehearsal/count_launches.py, and look at the difference."""
    assert count(way, monkeypatch) == EXPECTED[str(way)]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_flop_of_products_follow_from_the_parameters(way: Way) -> None:
    architecture = MODELS[way.model]
    assert EXPECTED[str(way)]["layer_flop_per_token"] == 2 * architecture.matrix_parameters // architecture.num_layers
