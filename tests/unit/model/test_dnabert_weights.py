"""DNABERT-S's weights: both file formats give the same tensors, a seed gives the same bits, other files are refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dnabert_reference import State, save_folder, seeded_state
from seqmill.errors import SeqmillError
from seqmill.model.dnabert_s import parameter_shapes
from seqmill.model.weights import Weights, load_weights
from seqmill.spec.architectures import DnabertArchitecture
from seqmill.spec.families import DNABERT_S
from seqmill.spec.models import DNABERT_MODELS, WEIGHTS_FOLDER, find_model

TINY = DnabertArchitecture(num_layers=2, hidden_dim=48, num_heads=3)
UNTRAINED_DIGEST = "16f770cbeba09c806bfa4caddfb340ace5cbc7d09be93de4a8faf9b52d71c063"


@pytest.fixture
def state() -> State:
    return seeded_state(TINY)


@pytest.fixture
def folder(state: State, tmp_path: Path) -> Path:
    return save_folder(state, TINY, tmp_path / "folder")


def load(folder: Path) -> Weights:
    return load_weights(find_model(str(folder)))


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(SeqmillError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_folder_gives_the_values_of_its_pickle(folder: Path, state: State) -> None:
    source = find_model(str(folder))
    assert (source.kind, source.family, source.architecture) == ("folder", DNABERT_S, None)
    weights = load_weights(source)
    assert weights.trained
    assert weights.architecture == TINY
    assert {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()} == parameter_shapes(TINY)
    for ours, theirs in {
        "embed.weight": "embeddings.word_embeddings.weight",
        "token_type.weight": "embeddings.token_type_embeddings.weight",
        "embed_norm.bias": "embeddings.LayerNorm.bias",
        "layers.1.qkv.weight": "encoder.layer.1.attention.self.Wqkv.weight",
        "layers.1.out.bias": "encoder.layer.1.attention.output.dense.bias",
        "layers.0.attention_norm.weight": "encoder.layer.0.attention.output.LayerNorm.weight",
        "layers.0.gated.weight": "encoder.layer.0.mlp.gated_layers.weight",
        "layers.1.down.weight": "encoder.layer.1.mlp.wo.weight",
        "layers.1.ffn_norm.weight": "encoder.layer.1.mlp.layernorm.weight",
    }.items():
        assert torch.equal(weights.tensors[ours], state[theirs]), ours


@pytest.mark.parametrize("form", ["safetensors", "prefix", "language-model head"])
def test_every_form_gives_the_same_weights(folder: Path, state: State, tmp_path: Path, form: str) -> None:
    other = save_folder(state, TINY, tmp_path / "other")
    file = other / "pytorch_model.bin"
    if form == "safetensors":
        file.unlink()
        save_file(state, other / "model.safetensors")
    else:
        prefixed = {f"bert.{name}": tensor for name, tensor in state.items()}
        if form == "language-model head":
            prefixed["cls.predictions.decoder.weight"] = torch.zeros(3)
        torch.save(prefixed, file)
    found, expected = load(other), load(folder)
    assert found.digest == expected.digest
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, expected.tensors[name]), name


def test_missing_and_unknown_tensors_are_listed(folder: Path, state: State) -> None:
    del state["encoder.layer.1.mlp.wo.bias"]
    state["encoder.layer.0.mlp.gated_layers.bias"] = torch.zeros(2 * TINY.ffn_dim)
    state["embeddings.position_embeddings.weight"] = torch.zeros(512, 48)
    torch.save(state, folder / "pytorch_model.bin")
    message = refusal(lambda: load(folder))
    assert message.startswith(f"{folder / 'pytorch_model.bin'}: not the tensors of DNABERT-S")
    assert "missing encoder.layer.1.mlp.wo.bias;" in message
    assert message.endswith("unknown embeddings.position_embeddings.weight, encoder.layer.0.mlp.gated_layers.bias")


def test_a_wrong_shape(folder: Path, state: State) -> None:
    state["encoder.layer.0.attention.self.Wqkv.weight"] = torch.zeros(48, 48)
    torch.save(state, folder / "pytorch_model.bin")
    expected = "encoder.layer.0.attention.self.Wqkv.weight has shape (48, 48), not (144, 48)"
    assert expected in refusal(lambda: load(folder))


def test_tensors_with_and_without_the_prefix(folder: Path, state: State) -> None:
    torch.save(state | {"bert.pooler.dense.bias": torch.ones(48)}, folder / "pytorch_model.bin")
    assert "twice, with a prefix and without it" in refusal(lambda: load(folder))


class Trap:
    """Creates a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def test_code_in_a_pickle_is_not_executed(folder: Path, state: State, tmp_path: Path) -> None:
    sprung, file = tmp_path / "sprung", folder / "pytorch_model.bin"
    torch.save(state | {"trap": Trap(sprung)}, file)
    torch.load(file, weights_only=False)
    assert sprung.is_dir()  # the trap works
    sprung.rmdir()
    message = refusal(lambda: load(folder))
    assert not sprung.exists()
    assert "mkdir" in message
    assert "weights_only" not in message


@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, {"epoch": 3}])
def test_a_pickle_of_something_else(folder: Path, content: Any) -> None:
    torch.save(content, folder / "pytorch_model.bin")
    assert "it holds more than tensors" in refusal(lambda: load(folder))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.to("meta"), "is a meta tensor"),
        (lambda t: t.to_sparse(), "is a sparse tensor"),
        (lambda t: t.to(torch.int64), "is of torch.int64"),
    ],
)
def test_tensors_without_usable_values(
    folder: Path, state: State, change: Callable[[torch.Tensor], torch.Tensor], expected: str
) -> None:
    key = "encoder.layer.1.mlp.wo.weight"
    torch.save(state | {key: change(state[key])}, folder / "pytorch_model.bin")
    assert f"pytorch_model.bin: {key} {expected}" in refusal(lambda: load(folder))


def test_a_truncated_pickle(folder: Path) -> None:
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:5000])
    assert f"{file}: cannot be loaded as weights of DNABERT-S: it is truncated" in refusal(lambda: load(folder))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05; DNABERT-S has 1e-12"),
        ({"intermediate_size": 100}, "intermediate_size is 100; DNABERT-S has 192"),
        ({"hidden_size": "wide"}, "not the shape of a model"),
        ({"num_hidden_layers": 10**9}, "num_layers is 1000000000"),
        ({"num_hidden_layers": float("inf")}, "num_layers is inf"),
        ({"num_attention_heads": 0}, "num_heads is 0"),
        ({"num_attention_heads": 40}, "num_heads is 40, which does not divide hidden_dim 48"),
        ({"vocab_size": None}, "vocabulary is None"),
    ],
)
def test_a_configuration_of_another_model(folder: Path, values: dict[str, Any], expected: str) -> None:
    change_config(folder, **values)
    assert expected in refusal(lambda: load(folder))


def test_a_plain_bert_is_not_taken_for_dnabert(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["alibi_starting_size"]
    path.write_text(json.dumps(config))
    assert "model_type is 'bert'" in refusal(lambda: find_model(str(folder)))


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "pytorch_model.bin").unlink()
    assert "neither a .safetensors file nor pytorch_model.bin" in refusal(lambda: find_model(str(folder)))


@pytest.mark.parametrize("name", DNABERT_MODELS)
def test_the_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = find_model(name)
    assert (source.kind, source.path, source.slug) == ("released", WEIGHTS_FOLDER / name, name)
    assert "no such weights" in refusal(lambda: load_weights(source))
    source = find_model(f"untrained:{name}")
    assert (source.kind, source.path, source.slug) == ("untrained", None, f"untrained-{name}")
    assert source.architecture == DNABERT_MODELS[name]
    save_folder(seeded_state(TINY), TINY, WEIGHTS_FOLDER / name)
    assert f"but {name} is" in refusal(lambda: load_weights(find_model(name)))  # the folder has another size


def test_untrained_weights_are_the_same_every_time() -> None:
    weights = load_weights(find_model("untrained:dnabert_s"))
    architecture = DNABERT_MODELS["dnabert_s"]
    assert not weights.trained
    assert weights.architecture == architecture
    assert {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()} == parameter_shapes(architecture)
    assert weights.digest == UNTRAINED_DIGEST  # a change would change every user's trial embeddings
