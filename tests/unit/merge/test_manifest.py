"""The manifest names the license and the paper of a released model."""

from pathlib import Path

import pytest

from pipeline import MODEL, Run
from reference import fair_esm_model, save_checkpoint
from seqmill.merge.manifest import license_and_citation
from seqmill.spec.models import MODELS, NAMES
from sequences import random_sequences

NAME = MODEL.removeprefix("untrained:")


def run_with(model: str, folder: Path) -> Run:
    fasta = folder / "two.fa"
    fasta.write_text("".join(f">{number}\n{text}\n" for number, text in enumerate(random_sequences([9, 4]))))
    return Run(folder, 1).build(fasta, model).embed().merge()


def test_a_released_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQMILL_MODELS", str(tmp_path))
    save_checkpoint(fair_esm_model(MODELS[NAME]), tmp_path / f"{NAME}.pt")
    manifest = run_with(f"facebook/{NAME}", tmp_path).manifest  # its name on the Hub
    assert manifest["license"] == {"name": "MIT", "from": f"https://huggingface.co/facebook/{NAME}"}
    assert manifest["citation"]["doi"] == "10.1126/science.ade2574"
    assert manifest["citation"]["year"] == 2023


def test_other_weights(tmp_path: Path) -> None:
    manifest = run_with(MODEL, tmp_path).manifest
    assert {"license", "citation"}.isdisjoint(manifest)


@pytest.mark.parametrize("name", NAMES)
def test_each_released_model_has_both(name: str) -> None:
    found = license_and_citation(name)
    assert found["license"].keys() == {"name", "from"}
    assert found["citation"].keys() == {"authors", "year", "title", "journal", "doi"}


@pytest.mark.parametrize("model", ["lab/esm2-tuned", "/weights/esmc_300m", "mine.pt", "untrained:esmc_300m"])
def test_weights_of_unknown_origin_have_none(model: str) -> None:
    assert license_and_citation(model) == {}
