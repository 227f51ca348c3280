"""The audit of ESM C, ProtT5, and ProstT5: their references agree with transformers, planted defects are caught."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import EsmcModel, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

import esmc_reference
import t5_reference
from audit_cases import Case, Tensors, make_case
from seqmill.embedding.audit import MOST_SEQUENCES, judge
from seqmill.embedding.pooling import mean_over_tokens
from seqmill.embedding.references import reference as written_out
from seqmill.embedding.references.families import make_reference
from seqmill.embedding.references.t5 import bucket
from seqmill.model.weights import open_weights
from seqmill.spec.architectures import EsmcArchitecture, T5Architecture
from sequences import random_sequences, relative_error

LENGTHS = [500, 300, 300, 128, 64, 64, 33, 17, 2, 1]
ESMC = EsmcArchitecture(4, 192, 3)
PROTT5, PROSTT5 = (T5Architecture(3, 96, 3, vocabulary, 64, 256) for vocabulary in (128, 150))
ARCHITECTURES = {"esmc": ESMC, "prott5": PROTT5, "prostt5": PROSTT5}
POOLINGS = ("mean", "max", "std")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Models with seeded weights, whose attention is sharp enough for positions to matter as in a trained one."""
    folder, sequences = tmp_path_factory.mktemp("models"), random_sequences(LENGTHS)
    for name, architecture in ARCHITECTURES.items():
        if isinstance(architecture, EsmcArchitecture):
            state = esmc_reference.seeded_state(architecture)
            for number in range(architecture.num_layers):
                state[f"layers.{number}.self_attn.q_norm.weight"] *= 3
            esmc_reference.save_folder(folder / name, architecture, state)
        else:
            state = t5_reference.seeded_state(architecture, score_spread=2)
            t5_reference.save_folder(folder / name, architecture, state)
    return {name: make_case(folder / f"{name} case", str(folder / name), sequences) for name in ARCHITECTURES}


@pytest.fixture(params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


def test_every_layer_of_the_reference_agrees_with_transformers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, parts = open_weights(case.source)
    assert architecture == ARCHITECTURES[case.family.name]
    # Blocks of 7 queries, and of 30 tokens.
    monkeypatch.setattr(written_out, "SCORES", architecture.num_heads * 200 * 7)
    monkeypatch.setattr(written_out, "FFN_TOKENS", 30)
    reference = make_reference(architecture, parts, 200)
    assert reference.name == f"{case.family.title} written out in float32, one segment at a time"
    is_t5 = isinstance(architecture, T5Architecture)
    theirs = (T5EncoderModel if is_t5 else EsmcModel).from_pretrained(case.source.path)
    for sequence in random_sequences([200, 31, 2, 1]):
        if is_t5:
            tokens = t5_reference.tokens_of(sequence, architecture)
            expected = t5_reference.reference_hidden(theirs, tokens, torch.float64)
        else:
            tokens = esmc_reference.tokens_of(sequence)
            expected = esmc_reference.reference_hidden(theirs, tokens, torch.float64)
        found = reference.embed(torch.tensor(tokens), tuple(range(len(expected))))
        assert list(found) == list(range(len(expected)))
        for layer, states in found.items():
            assert relative_error(states.double().numpy(), expected[layer].numpy()) < 5e-6, layer


def test_buckets_are_those_of_transformers() -> None:
    distances = torch.arange(1000)
    for num_buckets, most in ((32, 128), (16, 100), (32, 500)):
        theirs = T5Attention._relative_position_bucket(-distances, True, num_buckets, most)
        assert [bucket(distance, num_buckets // 2, most) for distance in distances.tolist()] == theirs.tolist()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_right_embeddings_pass_and_others_do_not(case: Case, pooling: str) -> None:
    model = case.model()
    hidden = [model(pack) for pack in case.packs()]
    audit = case.audit(case.embeddings(hidden, pooling), pooling)
    assert audit.sequences == MOST_SEQUENCES
    assert audit.longest_included
    assert audit.worst_relative_error < 2e-5
    assert judge(audit, "float32", case.family)[0] == "ok"
    other = POOLINGS[POOLINGS.index(pooling) - 1]
    assert judge(case.audit(case.embeddings(hidden, other), pooling), "float32", case.family)[0] == "fail"


def test_16_bits_pass(case: Case) -> None:
    for precision in set(case.family.precisions) - {"float32"}:
        audit = case.audit(case.compute(case.model(getattr(torch, precision))))
        assert judge(audit, precision, case.family)[0] == "ok"
        assert judge(audit, "float32", case.family)[0] != "ok"


def test_swapped_rows_are_caught(case: Case) -> None:
    embeddings = case.compute(case.model())
    embeddings[[0, 1]] = embeddings[[1, 0]]
    assert judge(case.audit(embeddings), "float32", case.family)[0] == "fail"


def test_special_tokens_in_the_mean_are_caught(case: Case) -> None:
    """The one after the residues is left out, and one before them if there is one."""
    model = case.model()
    whole = np.concatenate([mean_over_tokens(model(pack), pack).numpy() for pack in case.packs()])
    assert judge(case.audit(whole), "float32", case.family)[0] == "fail"


def halves_exchanged(tensors: Tensors) -> Tensors:
    gated = {name: torch.cat(tensors[name].chunk(2)[::-1]) for name in tensors if name.endswith("gated.weight")}
    return tensors | gated


def scaled(suffix: str, factor: float) -> Callable[[Tensors], Tensors]:
    return lambda tensors: (
        tensors | {name: tensor * factor for name, tensor in tensors.items() if name.endswith(suffix)}
    )


def ones(suffix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: (
        tensors | {name: torch.ones_like(tensor) for name, tensor in tensors.items() if name.endswith(suffix)}
    )


def residuals_not_divided(tensors: Tensors) -> Tensors:
    divisor = (ESMC.num_layers / 36) ** 0.5
    return scaled("out.weight", divisor)(scaled("down.weight", divisor)(tensors))


def queries_scaled(tensors: Tensors) -> Tensors:
    """As where scores are scaled by head_dim ** -0.5."""
    scaled = {}
    for name in tensors:
        if name.endswith("qkv.weight"):
            q, k, v = tensors[name].chunk(3)
            scaled[name] = torch.cat((q * PROTT5.head_dim**-0.5, k, v))
    return tensors | scaled


DEFECTS_OF_WEIGHTS = {
    "esmc: SiLU on the wrong half": halves_exchanged,
    "esmc: no weights in the norm of queries": ones("q_norm.weight"),
    "esmc: residuals not divided": residuals_not_divided,
    "esmc: the final norm without its weight": ones("final_norm.weight"),
    "prott5: scaled scores": queries_scaled,
    "prott5: no biases": scaled("relative_bias.weight", 0),
    "prostt5: the final norm without its weight": ones("final_norm.weight"),
}


@pytest.mark.parametrize("defect", DEFECTS_OF_WEIGHTS)
def test_defects_imitated_by_other_weights_are_caught(cases: dict[str, Case], defect: str) -> None:
    """With these weights, a correct forward pass computes what a defective one would with the model's weights."""
    case = cases[defect.partition(":")[0]]
    tensors = DEFECTS_OF_WEIGHTS[defect](case.tensors)
    require_caught(case, lambda dtype: case.model(dtype, tensors))


def require_caught(case: Case, make: Callable[[torch.dtype], object]) -> None:
    for dtype, verdicts in ((torch.float32, ("fail",)), (torch.bfloat16, ("warn", "fail"))):
        audit = case.audit(case.compute(make(dtype)))
        assert judge(audit, str(dtype).removeprefix("torch."), case.family)[0] in verdicts


@pytest.mark.parametrize("defect", ["mirrored", "causal", "one token off", "no far bucket"])
def test_wrong_biases_are_caught(cases: dict[str, Case], defect: str) -> None:
    case = cases["prott5"]

    def make(dtype: torch.dtype) -> object:
        model = case.model(dtype)
        middle = model.biases.shape[1] // 2
        if defect == "mirrored":
            model.biases = model.biases.flip(1).contiguous()
        elif defect == "causal":
            model.biases[:, middle + 1 :] = -1e9
        elif defect == "one token off":
            model.biases = model.biases.roll(1, dims=1)
        else:
            model.biases[:, : middle - 32] = model.biases[:, middle + 32 :] = 0
        return model

    require_caught(case, make)


@pytest.mark.parametrize("defect", ["in bfloat16", "backwards", "of neighboring channels"])
def test_a_wrong_rotation_is_caught(cases: dict[str, Case], defect: str) -> None:
    case = cases["esmc"]

    def make(dtype: torch.dtype) -> object:
        model = case.model(dtype)
        if defect == "in bfloat16":  # as after converting the whole model: the angles are rounded
            head_dim = ESMC.head_dim
            frequencies = (1 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)).bfloat16()
            angles = torch.outer(torch.arange(len(model.cos)).bfloat16(), frequencies).repeat(1, 2)
            model.cos, model.sin = angles.cos().float(), angles.sin().float()
        elif defect == "backwards":
            model.sin = -model.sin
        else:
            model.cos, model.sin = (table[:, :32].repeat_interleave(2, dim=1) for table in (model.cos, model.sin))
        return model

    require_caught(case, make)


def test_gelu_instead_of_relu_is_caught(cases: dict[str, Case]) -> None:
    case = cases["prott5"]

    def make(dtype: torch.dtype) -> object:
        model = case.model(dtype)
        for layer in model.layers:
            layer.up.activation = "gelu"
        return model

    require_caught(case, make)
