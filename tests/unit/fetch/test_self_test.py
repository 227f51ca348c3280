"""The self-test: weights that give the known numbers pass, and are refused after swapping two tensors."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import esm
import pytest
import torch

from dnabert_reference import reference_hidden, save_folder, seeded_state
from reference import fair_esm_hidden, fair_esm_model, save_checkpoint
from seqmill.errors import SeqmillError
from seqmill.fetch.self_test import self_test
from seqmill.index.bpe import BpeTokenizer
from seqmill.model.weights import Weights, load_weights
from seqmill.spec.architectures import DnabertArchitecture
from seqmill.spec.models import MODELS, UNTRAINED_TOKENIZER, ModelSource, find_model
from seqmill.spec.released import Case, Published, read_releases

NAME = "esm2_t6_8M_UR50D"
SEQUENCE = "GLDALQITV"
TOKENS = [0, 6, 4, 13, 5, 4, 16, 12, 11, 7, 2]
MEAN_SEQUENCE = "YFAASFAAFSSAIASFAASIALPFAAIASAAFLIASASSARFSIASFSSAIRLPLLA"
BASES = "ACGTAGCATCGGATCTATCTATCGACACTTGGTTATCGATCTACGAGCATCTCGTTAGC"


def published(model: esm.ESM2, tolerance: float = 1e-4) -> dict[str, Any]:
    """Return facts in the form of released.json, computed by fair-esm and rounded like published numbers."""
    hidden = fair_esm_hidden(model, SEQUENCE)[:3, :3].round(4).tolist()
    mean = fair_esm_hidden(model, MEAN_SEQUENCE)[1:-1].mean(axis=0)[:8].round(6).tolist()
    cases = [{"sequence": SEQUENCE, "tokens": TOKENS, "hidden": hidden}, {"sequence": MEAN_SEQUENCE, "mean": mean}]
    return {"from": "fair-esm 2.0.0", "tolerance": tolerance, "cases": cases}


def swap(model: esm.ESM2, first: str, second: str) -> esm.ESM2:
    """Swap two tensors of a model."""
    tensors = dict(model.named_parameters())
    one, other = tensors[first].detach().clone(), tensors[second].detach().clone()
    with torch.no_grad():
        tensors[first].copy_(other)
        tensors[second].copy_(one)
    return model


SWAPS = {
    "fc1 of two layers": ("layers.1.fc1.weight", "layers.4.fc1.weight"),
    "q and k": ("layers.2.self_attn.q_proj.weight", "layers.2.self_attn.k_proj.weight"),
    "out of two layers": ("layers.0.self_attn.out_proj.weight", "layers.5.self_attn.out_proj.weight"),
    "biases": ("layers.3.fc2.bias", "layers.0.fc2.bias"),
    "layer norms": ("layers.1.final_layer_norm.weight", "layers.2.self_attn_layer_norm.weight"),
}


def test_known_numbers(tmp_path: Path) -> None:
    model = fair_esm_model(MODELS[NAME])
    path = save_checkpoint(model, tmp_path / f"{NAME}.pt")
    source = ModelSource(NAME, "released", MODELS[NAME], path)
    facts = published(model)
    numbers = Published(facts["from"], facts["tolerance"], [Case(**case) for case in facts["cases"]])
    assert "computes the published numbers (fair-esm 2.0.0) to" in self_test(source, load_weights(source), numbers)


@pytest.mark.parametrize("tolerance", [1e-4, 0.02])
@pytest.mark.parametrize("names", SWAPS.values(), ids=SWAPS)
def test_a_swapped_tensor_is_found_by_a_wide_margin(tmp_path: Path, names: tuple[str, str], tolerance: float) -> None:
    """This holds for a GPU's tolerance too; the means of these weights have the same size as 3B's."""
    model = fair_esm_model(MODELS[NAME])
    facts = published(model, tolerance)
    path = save_checkpoint(swap(model, *names), tmp_path / f"{NAME}.pt")
    source = ModelSource(NAME, "released", MODELS[NAME], path)
    numbers = Published(facts["from"], tolerance, [Case(**case) for case in facts["cases"]])
    with pytest.raises(SeqmillError) as caught:
        self_test(source, load_weights(source), numbers)
    message = str(caught.value)
    assert f"{path}: not the trained weights of {NAME}" in message
    assert "fair-esm 2.0.0" in message
    assert "\n" not in message


def test_the_published_numbers_refuse_untrained_weights() -> None:
    source = find_model(f"untrained:{NAME}")
    with pytest.raises(SeqmillError, match="not the trained weights"):
        self_test(source, load_weights(source), read_releases()[NAME].published)


def test_tokens_that_differ_from_the_published_ones() -> None:
    source = find_model(f"untrained:{NAME}")
    numbers = Published("", 1e9, [Case(SEQUENCE, tokens=[0, *TOKENS])])
    with pytest.raises(SeqmillError, match=r"GLDALQITV is the tokens \[0, 6, 4"):
        self_test(source, load_weights(source), numbers)


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    model = fair_esm_model(MODELS[NAME])
    numbers = [Case(**case) for case in published(model)["cases"]]
    with torch.no_grad():
        model.layers[2].fc2.bias[5] = float("nan")
    source = find_model(str(save_checkpoint(model, tmp_path / "nan.pt")))
    with pytest.raises(SeqmillError, match="differs by nan"):
        self_test(source, load_weights(source), Published("", 0.02, numbers))


def test_too_little_memory_and_missing_numbers() -> None:
    source = find_model(f"untrained:{NAME}")
    huge = Weights(MODELS[NAME], {"of 40 TB": torch.empty(10**13, device="meta")}, "", trained=True)
    assert "no numbers" in self_test(source, huge, None)
    said = self_test(source, huge, Published("", 1e-4, [Case(SEQUENCE, tokens=TOKENS)]))
    assert said.startswith("not tested: that needs 52000.0 GB of memory")
    assert "doctor --weights` where there is more" in said


@pytest.mark.parametrize("spoil", ["nothing", "tensors", "tokenizer"])
def test_nucleotides_with_their_tokenizer(tmp_path: Path, spoil: str) -> None:
    tiny = DnabertArchitecture(num_layers=2, hidden_dim=96, num_heads=3)
    state = seeded_state(tiny)
    tokens, _ = BpeTokenizer.from_file(UNTRAINED_TOKENIZER).encode([BASES.encode()])
    mean = reference_hidden(state, tiny, [tokens], torch.float32)[0].mean(dim=0)[:8]
    if spoil == "tensors":
        names = [f"encoder.layer.{layer}.mlp.gated_layers.weight" for layer in (0, 1)]
        state[names[0]], state[names[1]] = state[names[1]], state[names[0]]
    folder = save_folder(state, tiny, tmp_path / "folder")
    tokenizer = json.loads(UNTRAINED_TOKENIZER.read_text())
    if spoil == "tokenizer":
        tokenizer["model"]["merges"].pop(3)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    source = replace(find_model(str(folder)), name="dnabert_s")

    def test() -> str:
        return self_test(source, load_weights(source), Published("reference", 0.015, [Case(BASES, mean=mean.tolist())]))

    if spoil == "nothing":
        assert "computes the published numbers" in test()
    else:
        with pytest.raises(SeqmillError, match=r"not the trained weights of dnabert_s.*ACGTAGCATCGG\.\.\."):
            test()
