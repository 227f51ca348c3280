"""The audit of nucleotides: a separate reference, segments and pooling written out, planted defects caught."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from audit_cases import Case, Tensors, make_case
from dnabert_reference import GOLDEN, GOLDEN_LENGTHS, SMALL, random_tokens, reference_hidden, save_folder, seeded_state
from families import random_contigs
from seqmill.embedding.audit import MOST_SEQUENCES, judge
from seqmill.embedding.pooling import mean_over_tokens
from seqmill.embedding.references import reference as written_out
from seqmill.embedding.references.families import make_reference
from seqmill.model.alibi import attend
from seqmill.model.dnabert_s import LAYER_NORM_EPS
from seqmill.model.dnabert_weights import NAMING
from seqmill.model.pack import Pack
from seqmill.spec.architectures import DnabertArchitecture
from seqmill.spec.families import DNABERT_S
from seqmill.spec.lengths import LengthPolicy

ARCHITECTURE = DnabertArchitecture(num_layers=3, hidden_dim=192)  # twelve heads, whose slopes have two series
BASES = [1300, 1000, 700, 300, 300, 250, 60, 17, 2]
WINDOWS = LengthPolicy("window", 400, 300, 280, "both")
POOLINGS = ("mean", "mean_tokens", "cls")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with seeded weights, whose queries and keys are large enough for biases to matter as in a trained one."""
    state = seeded_state(ARCHITECTURE)
    for number in range(ARCHITECTURE.num_layers):
        state[f"encoder.layer.{number}.attention.self.Wqkv.weight"][: 2 * ARCHITECTURE.hidden_dim] *= 1.5
    return save_folder(state, ARCHITECTURE, tmp_path_factory.mktemp("dnabert") / "model")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Case:
    return make_case(folder.parent / "whole", str(folder), random_contigs(BASES))


@pytest.fixture(scope="module")
def windows(folder: Path) -> Case:
    return make_case(folder.parent / "windows", str(folder), random_contigs(BASES), WINDOWS)


@pytest.fixture(params=["whole", "windows"])
def case(request: pytest.FixtureRequest) -> Case:
    return request.getfixturevalue(request.param)


def test_the_reference_agrees_with_numbers_from_the_published_code() -> None:
    reference = make_reference(SMALL, parts_of(seeded_state(SMALL)), max(GOLDEN_LENGTHS))
    assert reference.name == "DNABERT-S written out in float32, one segment at a time"
    for tokens, (first, norm, last) in zip(random_tokens(GOLDEN_LENGTHS), GOLDEN, strict=True):
        hidden = reference.embed(torch.from_numpy(tokens.astype(np.int64)), (3,))[3]
        mean = hidden.double().mean(dim=0)
        assert mean[:3].tolist() == pytest.approx(first, abs=2e-5)
        assert float(mean.norm()) == pytest.approx(norm, rel=1e-5)
        assert hidden[-1, -3:].tolist() == pytest.approx(last, abs=5e-5)


@pytest.mark.parametrize("num_heads", [1, 3, 4, 12])
def test_any_number_of_heads_and_of_queries_per_block(num_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = DnabertArchitecture(2, 12 * num_heads, num_heads)
    state = seeded_state(architecture)
    monkeypatch.setattr(written_out, "SCORES", 12 * 100 * 7)
    monkeypatch.setattr(written_out, "FFN_TOKENS", 30)
    reference = make_reference(architecture, parts_of(state), 100)
    for tokens in random_tokens([100, 31, 3]):
        (expected,) = reference_hidden(state, architecture, [tokens], torch.float64)
        found = reference.embed(torch.from_numpy(tokens.astype(np.int64)), (2,))[2].double()
        assert (found - expected).norm() < 1e-5 * expected.norm()


def parts_of(state: Tensors) -> dict[str, list[torch.Tensor]]:
    """Return a published model's tensors by canonical name."""
    parts = {}
    names = {**NAMING.whole, **{ours: theirs for ours, (theirs,) in NAMING.parts.items()}}
    for name, tensor in state.items():
        canonical = name.replace("encoder.layer.", "layers.")
        for ours, theirs in names.items():
            canonical = canonical.replace(f"{theirs}.", f"{ours}.")
        if not name.startswith("pooler."):
            parts[canonical] = [tensor]
    return parts


@pytest.mark.parametrize("pooling", POOLINGS)
def test_right_embeddings_pass_and_others_do_not(case: Case, pooling: str) -> None:
    hidden = [case.model()(pack) for pack in case.packs()]
    audit = case.audit(case.embeddings(hidden, pooling), pooling)
    assert audit.sequences == MOST_SEQUENCES
    assert audit.longest_included
    assert audit.worst_relative_error < 2e-5
    assert judge(audit, "float32", DNABERT_S)[0] == "ok"
    for other in set(POOLINGS) - {pooling}:
        assert judge(case.audit(case.embeddings(hidden, other), pooling), "float32", DNABERT_S)[0] == "fail"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_pass(case: Case, dtype: torch.dtype) -> None:
    audit = case.audit(case.compute(case.model(dtype)))
    assert judge(audit, str(dtype).removeprefix("torch."), DNABERT_S)[0] == "ok"
    assert judge(audit, "float32", DNABERT_S)[0] != "ok"


@pytest.mark.full
def test_bfloat16_passes_in_the_published_shape(tmp_path: Path) -> None:
    """Short sequences have the largest errors."""
    case = make_case(tmp_path / "untrained", "untrained:dnabert_s", random_contigs([300, 64, 8, 2, 1, 1]))
    audit = case.audit(case.compute(case.model(torch.bfloat16)))
    assert audit.sequences == case.index.num_sequences
    assert judge(audit, "bfloat16", DNABERT_S)[0] == "ok"


def halves_exchanged(tensors: Tensors) -> Tensors:
    gated = {name: torch.cat(tensors[name].chunk(2)[::-1]) for name in tensors if name.endswith("gated.weight")}
    return tensors | gated


def heads_exchanged(tensors: Tensors) -> Tensors:
    """Reorder the heads, which changes only their slopes: equivalent to slopes in another order."""
    changed = dict(tensors)
    heads, d = ARCHITECTURE.num_heads, ARCHITECTURE.hidden_dim
    order = [0, 8, 1, 9, 2, 10, 3, 11, 4, 5, 6, 7]  # sorted slopes
    for name, tensor in tensors.items():
        if ".qkv." in name:
            changed[name] = tensor.view(3, heads, d // heads, -1)[:, order].reshape(tensor.shape)
        elif name.endswith("out.weight"):
            changed[name] = tensor.view(d, heads, d // heads)[:, order].reshape(tensor.shape)
    return changed


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {part: torch.zeros_like(tensors[part])}


DEFECTS_OF_WEIGHTS = {
    "GELU on the wrong half": halves_exchanged,
    "slopes in another order": heads_exchanged,
    "no token type": without("token_type.weight"),
    "a layer without biases of qkv": without("layers.2.qkv.bias"),
    "a layer without biases of out": without("layers.1.out.bias"),
}


@pytest.mark.parametrize("defect", DEFECTS_OF_WEIGHTS)
def test_defects_imitated_by_other_weights_are_caught(whole: Case, defect: str) -> None:
    """With these weights, a correct forward pass computes what a defective one would with the model's weights."""
    tensors = DEFECTS_OF_WEIGHTS[defect](whole.tensors)
    for dtype, verdicts in ((torch.float32, ("fail",)), (torch.bfloat16, ("warn", "fail"))):
        audit = whole.audit(whole.compute(whole.model(dtype, tensors)))
        assert judge(audit, str(dtype).removeprefix("torch."), DNABERT_S)[0] in verdicts


@pytest.mark.parametrize("defect", ["none", "on one side", "causal", "twice"])
def test_wrong_distance_biases_are_caught(whole: Case, defect: str) -> None:
    model = whole.model()
    middle = model.biases.shape[1] // 2
    if defect == "on one side":
        model.biases[:, middle + 1 :] = 0
    elif defect == "causal":
        model.biases[:, middle + 1 :] = -1e9
    else:
        model.biases.mul_({"none": 0, "twice": 2}[defect])
    audit = whole.audit(whole.compute(model))
    assert judge(audit, "float32", DNABERT_S)[0] == "fail"
    assert judge(audit, "bfloat16", DNABERT_S)[0] in ("warn", "fail")


def test_pre_norm_instead_of_post_norm_is_caught(whole: Case) -> None:
    model = whole.model()

    def norm(x: torch.Tensor, of: torch.nn.Module) -> torch.Tensor:
        return F.layer_norm(x, x.shape[1:], of.weight, of.bias, LAYER_NORM_EPS)

    def hidden(pack: Pack) -> torch.Tensor:
        x = norm(F.embedding(pack.tokens.int(), model.embed), model.embed_norm)
        for layer in model.layers:
            qkv = layer.qkv(norm(x, layer.attention_norm)).view(-1, 3, ARCHITECTURE.num_heads, ARCHITECTURE.head_dim)
            x = x + layer.out(attend("sdpa", qkv, model.biases, pack))
            gate, value = layer.gated(norm(x, layer.ffn_norm)).chunk(2, dim=1)
            x = x + layer.down(F.gelu(gate) * value)
        return x

    with torch.inference_mode():
        audit = whole.audit(whole.embeddings([hidden(pack) for pack in whole.packs()]))
    assert judge(audit, "float32", DNABERT_S)[0] == judge(audit, "bfloat16", DNABERT_S)[0] == "fail"


def test_the_tanh_form_of_gelu_is_caught_in_float32(whole: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x: exact(x, approximate="tanh"))
    audit = whole.audit(whole.compute(whole.model()))
    assert judge(audit, "float32", DNABERT_S)[0] == "warn"


def test_swapped_rows_are_caught(case: Case) -> None:
    embeddings = case.compute(case.model())
    embeddings[[0, 1]] = embeddings[[1, 0]]
    assert judge(case.audit(embeddings), "float32", DNABERT_S)[0] == "fail"


@pytest.mark.parametrize("defect", ["unweighted", "forward alone", "without the last window"])
def test_wrong_means_over_segments_are_caught(windows: Case, defect: str) -> None:
    """A contig's last window is shorter than the others, and half of its segments are from the other strand."""
    model, index = windows.model(), windows.index
    vectors = np.concatenate([mean_over_tokens(model(pack), pack).numpy() for pack in windows.packs()])
    embeddings = []
    for first, last in itertools.pairwise(index.sequence_segments):
        weights = index.segment_lengths[first:last].astype(np.float64)
        if defect == "unweighted":
            weights[:] = 1
        elif defect == "forward alone":
            weights[len(weights) // 2 :] = 0
        elif len(weights) > 2:
            weights[[len(weights) // 2 - 1, -1]] = 0
        embeddings.append(weights @ vectors[first:last] / weights.sum())
    audit = windows.audit(np.float32(embeddings))
    assert judge(audit, "float32", DNABERT_S)[0] == "fail"


def test_a_contig_that_would_take_hours_is_left_out(folder: Path) -> None:
    """Its attention scores alone would take 800 GB if they were not computed in blocks."""
    case = make_case(folder.parent / "long", str(folder), random_contigs([600_000]))
    audit = case.audit(np.zeros((1, ARCHITECTURE.hidden_dim), np.float32))
    assert audit.sequences == 0
    verdict, message = judge(audit, "float32", DNABERT_S)
    assert verdict == "none"
    assert "may take longer than 600 s" in message
