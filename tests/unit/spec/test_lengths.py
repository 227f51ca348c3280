"""The length policy for given settings, for proteins and nucleotides, and refused settings."""

import pytest

from seqmill.errors import SeqmillError
from seqmill.spec.families import DNABERT_S, ESM2, ESMC, PROSTT5, PROTT5, Family
from seqmill.spec.lengths import LengthPolicy, choose_length_policy


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        (ESM2, {}, LengthPolicy("truncate", 1022)),
        (ESM2, {"strand": "both"}, LengthPolicy("truncate", 1022)),
        (ESM2, {"window": 500, "stride": 100}, LengthPolicy("window", 500, 500, 100)),
        (ESM2, {"stride": 100}, LengthPolicy("window", 1022, 1022, 100)),
        (ESM2, {"long_sequences": "reject", "max_length": 30}, LengthPolicy("reject", 30)),
        (ESM2, {"long_sequences": "window"}, LengthPolicy("window", 1022, 1022, 511)),
        (ESM2, {"long_sequences": "window", "window": 101}, LengthPolicy("window", 101, 101, 51)),
        (ESM2, {"long_sequences": "full"}, LengthPolicy("full", 0)),
        (ESMC, {}, LengthPolicy("truncate", 2046)),  # 2,048 tokens
        (ESMC, {"strand": "both"}, LengthPolicy("truncate", 2046)),
        (ESMC, {"long_sequences": "window"}, LengthPolicy("window", 2046, 2046, 1023)),
        (PROTT5, {}, LengthPolicy("truncate", 12_000)),
        (PROSTT5, {}, LengthPolicy("truncate", 12_000)),
        (PROTT5, {"window": 500}, LengthPolicy("window", 500, 500, 250)),
        (PROSTT5, {"long_sequences": "full", "strand": "both"}, LengthPolicy("full", 0)),
        (DNABERT_S, {}, LengthPolicy("window", 10_000, 10_000, 10_000)),
        (DNABERT_S, {"strand": "both"}, LengthPolicy("window", 10_000, 10_000, 10_000, "both")),
        (DNABERT_S, {"window": 400}, LengthPolicy("window", 400, 400, 400)),
        (DNABERT_S, {"window": 20_000, "stride": 5000}, LengthPolicy("window", 20_000, 20_000, 5000)),
        (DNABERT_S, {"max_length": 3000, "window": 500}, LengthPolicy("window", 3000, 500, 500)),
        (DNABERT_S, {"max_length": 3000, "stride": 1000}, LengthPolicy("window", 3000, 3000, 1000)),
        (DNABERT_S, {"long_sequences": "truncate"}, LengthPolicy("truncate", 10_000)),
    ],
)
def test_auto_suits_the_model(family: Family, settings: dict, expected: LengthPolicy) -> None:
    assert choose_length_policy(family, **settings) == expected


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        (ESM2, {"max_length": 0}, "max_length must be 1 to 1000000 residues or bases, not 0"),
        (ESM2, {"max_length": 1_000_001}, "max_length must be 1 to 1000000 residues or bases, not 1000001"),
        (ESM2, {"long_sequences": "drop"}, "long_sequences must be one of truncate, window, full, reject, not drop"),
        (DNABERT_S, {"strand": "reverse"}, "strand must be one of forward, both, not reverse"),
        (
            DNABERT_S,
            {"max_length": 300, "window": 400},
            "window must be 1 to 300 residues or bases, no longer than max_length, not 400",
        ),
        (
            DNABERT_S,
            {"long_sequences": "full", "window": 400},
            "window is 400, but long_sequences: full does not use it; set long_sequences to window",
        ),
        (
            ESM2,
            {"long_sequences": "truncate", "stride": 10},
            "stride is 10, but long_sequences: truncate does not use it",
        ),
        (
            ESM2,
            {"long_sequences": "full", "max_length": 100},
            "max_length is 100, but long_sequences: full does not use it; omit it",
        ),
        (DNABERT_S, {"window": 400, "stride": 401}, "stride must be 1 to 400 residues or bases"),
        (
            DNABERT_S,
            {"window": 400, "stride": 0},
            "stride must be 1 to 400 residues or bases, no longer than the window, not 0",
        ),
    ],
)
def test_senseless_settings_are_refused(family: Family, settings: dict, words: str) -> None:
    with pytest.raises(SeqmillError, match=r"^[a-z_]+ ") as refusal:
        choose_length_policy(family, **settings)
    assert words in str(refusal.value)
