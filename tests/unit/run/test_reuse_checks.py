"""Vectors of one model family are never taken for those of another, although their tokens are equal."""

from pathlib import Path

import pytest

from families import write_fasta
from pipeline import MODEL, Run
from seqmill.embedding.job import model_of
from seqmill.errors import SeqmillError
from seqmill.index.build import build_index
from seqmill.run.plan import PlanOptions, plan_fasta
from seqmill.run.reuse_checks import known_settings, require_settings, reused_by
from seqmill.spec.families import ESMC
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import ModelSource, find_model
from seqmill.spec.outputs import Outputs
from seqmill.spec.task import ComputeSettings
from seqmill.store.index import open_index
from seqmill.store.reuse import open_source

OTHER = "untrained:esmc_300m"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Results of ESM-2."""
    folder = tmp_path_factory.mktemp("earlier")
    return Run(folder, 1).build(write_fasta(folder / "p.faa", ["MKV", "MKLLV"])).embed().merge()


def test_a_model_of_another_family_is_named_before_any_setting(earlier: Run) -> None:
    source = open_source(earlier.embeddings)
    folder = ModelSource("mine", "folder", None, Path("mine"), ESMC)  # whose width is not known yet
    known = known_settings(folder, LengthPolicy(max_length=9), Outputs(), "float32")
    said = rf"^{earlier.embeddings}: can't be reused: its model is {MODEL}, not mine; take it out of reuse$"
    with pytest.raises(SeqmillError, match=said):
        require_settings(source, folder, known, "float32")


def test_a_plan_refuses_another_family(earlier: Run, tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "p.faa", ["MKV"])
    options = PlanOptions(ComputeSettings("cpu"), 1, "float32", 0)
    with pytest.raises(SeqmillError, match=f"can't be reused: its model is {MODEL}, not {OTHER}; take it out of"):
        plan_fasta(fasta, OTHER, LengthPolicy(), [earlier.embeddings], None, options)


def test_an_index_refuses_another_family_of_equal_policies(earlier: Run, tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "p.faa", ["MKV"])
    with pytest.raises(SeqmillError, match=r"it has tokenizer=esm2, this computation tokenizer=esmc; take it out of"):
        build_index(fasta, tmp_path / "index.h5", OTHER, LengthPolicy(), [earlier.embeddings])
    with pytest.raises(SeqmillError, match=r"it has tokenizer=esm2, this computation tokenizer=prott5; take it out"):
        build_index(fasta, tmp_path / "index.h5", "untrained:prott5_xl_u50", LengthPolicy(), [earlier.embeddings])


def test_equal_tokens_of_two_families_are_two_indexes(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "p.faa", ["MKV", "MKLLV"])
    made = []
    for model in (MODEL, OTHER):
        build_index(fasta, tmp_path / "index.h5", model, LengthPolicy())
        made.append(open_index(tmp_path / "index.h5"))
        made[-1].tokens.tolist()  # read before the file is replaced
    esm2, esmc = made
    assert esm2.tokens.tolist() == esmc.tokens.tolist()
    assert esm2.digest != esmc.digest
    with pytest.raises(SeqmillError, match=rf"made for {OTHER}, a model of ESM C, and {MODEL} is one of ESM-2; build"):
        model_of(esmc, MODEL)


def test_vectors_are_not_reused_again_for_another_family(earlier: Run, tmp_path: Path) -> None:
    again = Run(tmp_path, 1).build(write_fasta(tmp_path / "p.faa", ["MKV"]), reuse=[earlier.embeddings])
    for name, expected in ((MODEL, {earlier.embeddings}), (OTHER, set())):
        model = find_model(name)
        known = {**known_settings(model, LengthPolicy(), Outputs(), "auto"), "layers": "6"}
        assert set(reused_by(again.folder, known)) == expected
