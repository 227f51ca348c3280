"""ProtT5's and ProstT5's weights: every form gives the same tensors, a seed the same bits, other files are refused."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pack_parity import make_model, one_pack
from seqmill.errors import SeqmillError
from seqmill.model.relative import make_biases
from seqmill.model.t5 import T5Encoder, parameter_shapes
from seqmill.model.weights import Weights, load_weights, untrained_tensors
from seqmill.spec.architectures import T5Architecture
from seqmill.spec.families import PROSTT5, PROTT5
from seqmill.spec.models import T5_MODELS, find_model
from t5_reference import State, random_tokens, save_folder, save_pickle, seeded_state

TINY = T5Architecture(num_layers=2, hidden_dim=32, num_heads=2, key_dim=32, feed_forward_dim=64)
UNTRAINED_DIGEST = "a8919577454055d23b6761a48e740336cd3099ad981bddb5aa3490743a0dd80f"
TABLE = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


@pytest.fixture
def state() -> State:
    return seeded_state(TINY)


@pytest.fixture
def folder(state: State, tmp_path: Path) -> Path:
    return save_folder(tmp_path / "folder", TINY, state)


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """Encoder and decoder, as published."""
    return save_pickle(tmp_path / "pickled", TINY)


def load(path: Path) -> Weights:
    return load_weights(find_model(str(path)))


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(SeqmillError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder: Path, changed: State, removed: tuple[str, ...] = ()) -> None:
    """Change the safetensors or the pickle of a folder."""
    file = folder / "model.safetensors"
    state = load_file(file) if file.exists() else torch.load(folder / "pytorch_model.bin")
    state = {name: tensor for name, tensor in (state | changed).items() if name not in removed}
    if file.exists():
        save_file(state, file)
    else:
        torch.save(state, folder / "pytorch_model.bin")


def test_a_folder_gives_the_values_of_the_reference(folder: Path, state: State) -> None:
    weights = load(folder)
    assert weights.trained
    assert weights.architecture == TINY
    assert {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()} == parameter_shapes(TINY)
    for ours, theirs in {
        "embed.weight": "shared.weight",
        "relative_bias.weight": TABLE,
        "layers.0.attention_norm.weight": "encoder.block.0.layer.0.layer_norm.weight",
        "layers.1.out.weight": "encoder.block.1.layer.0.SelfAttention.o.weight",
        "layers.1.ffn_norm.weight": "encoder.block.1.layer.1.layer_norm.weight",
        "layers.0.up.weight": "encoder.block.0.layer.1.DenseReluDense.wi.weight",
        "layers.1.down.weight": "encoder.block.1.layer.1.DenseReluDense.wo.weight",
        "final_norm.weight": "encoder.final_layer_norm.weight",
    }.items():
        assert torch.equal(weights.tensors[ours], state[theirs]), ours
    for found, part in zip(weights.tensors["layers.1.qkv.weight"].chunk(3), "qkv", strict=True):
        assert torch.equal(found, state[f"encoder.block.1.layer.0.SelfAttention.{part}.weight"])


def save_shards(folder: Path) -> Path:
    save_folder(folder, TINY, shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def save_with_other_table(folder: Path) -> Path:
    """The table of tokens under its other name alone."""
    save_folder(folder, TINY)
    change_tensors(folder, {"encoder.embed_tokens.weight": seeded_state(TINY)["shared.weight"]}, ("shared.weight",))
    return folder


def save_with_head(folder: Path) -> Path:
    save_folder(folder, TINY)
    state = load_file(folder / "model.safetensors")
    prefixed = {f"transformer.{name}": tensor for name, tensor in state.items()}
    save_file(prefixed | {"lm_head.weight": torch.zeros(128, 32)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("save", [save_shards, save_with_other_table, save_with_head])
def test_every_form_gives_the_same_weights(folder: Path, tmp_path: Path, save: Callable[[Path], Path]) -> None:
    found, expected = load(save(tmp_path / "other")), load(folder)
    assert found.architecture == expected.architecture
    assert found.digest == expected.digest
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, expected.tensors[name]), name


def test_the_whole_model_as_a_pickle_of_float16(pickled: Path, state: State, tmp_path: Path) -> None:
    assert any(name.startswith("decoder.") for name in torch.load(pickled / "pytorch_model.bin"))
    found = load(pickled)
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float16}
    halves = {name: tensor.half() for name, tensor in state.items()}
    assert found.digest == load(save_folder(tmp_path / "halves", TINY, halves)).digest
    assert found.digest != load(save_folder(tmp_path / "full", TINY, state)).digest


@pytest.mark.parametrize("vocabulary", [128, 150])
def test_the_vocabulary_tells_the_family(vocabulary: int, tmp_path: Path) -> None:
    architecture = T5Architecture(1, 32, 2, vocabulary, key_dim=32, feed_forward_dim=64)
    source = find_model(str(save_folder(tmp_path / "mine", architecture)))
    assert source.family == architecture.family == {128: PROTT5, 150: PROSTT5}[vocabulary]
    assert load_weights(source).architecture == architecture


def test_missing_and_unknown_tensors_are_listed(folder: Path) -> None:
    removed = ("encoder.block.1.layer.1.DenseReluDense.wo.weight", TABLE)
    change_tensors(folder, {"encoder.block.0.adapter.weight": torch.zeros(2)}, removed)
    message = refusal(lambda: load(folder))
    assert message == (
        f"{folder}: not the tensors of T5: missing {TABLE}, {removed[0]}; unknown encoder.block.0.adapter.weight"
    )


def test_a_decoder_alone_is_refused(pickled: Path) -> None:
    file = pickled / "pytorch_model.bin"
    torch.save({name: t for name, t in torch.load(file).items() if name.startswith("decoder.")}, file)
    assert refusal(lambda: load(pickled)).startswith(f"{file}: not the tensors of T5: missing encoder.block.0.layer.0.")


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        (TABLE, (32, 3), (32, 2)),
        ("shared.weight", (150, 32), (128, 32)),
        ("encoder.block.0.layer.0.SelfAttention.k.weight", (32, 32), (64, 32)),
        ("encoder.block.1.layer.0.SelfAttention.o.weight", (64, 32), (32, 64)),
    ],
)
@pytest.mark.parametrize("form", ["safetensors", "pickle"])
def test_a_wrong_shape(request: Any, form: str, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    path = request.getfixturevalue("pickled" if form == "pickle" else "folder")
    change_tensors(path, {name: torch.zeros(shape)})
    file = path / "pytorch_model.bin" if form == "pickle" else path
    assert refusal(lambda: load(path)) == f"{file}: {name} has shape {shape}, not {wanted}"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"feed_forward_proj": "gated-gelu"}, "feed_forward_proj is 'gated-gelu'; T5 has 'relu'"),  # Ankh's
        ({"feed_forward_proj": "gated-relu"}, "feed_forward_proj is 'gated-relu'; T5 has 'relu'"),
        ({"is_gated_act": True}, "is_gated_act is True; T5 has False"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05; T5 has 1e-06"),
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"d_kv": 0}, "key_dim is 0"),
        ({"d_ff": "wide"}, "feed_forward_dim is 'wide'"),
        ({"relative_attention_num_buckets": 0}, "buckets is 0"),
        ({"relative_attention_num_buckets": 2}, "buckets is 2"),
        ({"relative_attention_num_buckets": 33}, "buckets is 33"),
        ({"relative_attention_max_distance": 0}, "max_distance is 0"),
        ({"relative_attention_max_distance": 8}, "max_distance is 8"),
    ],
)
def test_a_configuration_of_another_model(folder: Path, values: dict[str, Any], expected: str) -> None:
    change_config(folder, **values)
    message = refusal(lambda: load(folder))
    assert message.startswith(f"{folder / 'config.json'}: ")
    assert expected in message


@pytest.mark.parametrize("key", ["num_layers", "d_model", "num_heads", "d_kv", "d_ff"])
def test_a_configuration_without_a_size(folder: Path, key: str) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    assert refusal(lambda: load(folder)) == f"{path}: lacks '{key}'"


class Trap:
    """Creates a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def test_code_in_a_pickle_is_not_executed(pickled: Path, tmp_path: Path) -> None:
    sprung, file = tmp_path / "sprung", pickled / "pytorch_model.bin"
    torch.save(torch.load(file) | {"trap": Trap(sprung)}, file)
    torch.load(file, weights_only=False)
    assert sprung.is_dir()  # the trap works
    sprung.rmdir()
    message = refusal(lambda: load(pickled))
    assert not sprung.exists()
    assert message.startswith(f"{file}: not loaded as weights of T5: its pickle calls for ")
    assert "mkdir" in message
    assert "weights_only" not in message


@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, {"epoch": 3}])
def test_a_pickle_of_something_else(pickled: Path, content: Any) -> None:
    torch.save(content, pickled / "pytorch_model.bin")
    assert "not weights of T5: it holds more than tensors" in refusal(lambda: load(pickled))


@pytest.mark.parametrize("kept", [0, 7, 5000])
def test_damaged_files(folder: Path, pickled: Path, kept: int) -> None:
    for path in (folder / "model.safetensors", pickled / "pytorch_model.bin"):
        path.write_bytes(path.read_bytes()[:kept])
        assert refusal(lambda: load(path.parent)).startswith(f"{path}: "), path  # noqa: B023


@pytest.mark.parametrize("name", T5_MODELS)
def test_the_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no such weights" in refusal(lambda: load_weights(find_model(name)))
    source = find_model(f"untrained:{name}")
    assert (source.family, source.architecture) == (T5_MODELS[name].family, T5_MODELS[name])
    save_folder(find_model(name).path, TINY)
    assert f"but {name} is" in refusal(lambda: load_weights(find_model(name)))  # the folder has another size


@pytest.mark.parametrize("name", ["prott5_xl_u50", "prostt5", "esmc_300m", "dnabert_s"])
def test_a_released_folder_without_its_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an interrupted copy."""
    monkeypatch.chdir(tmp_path)
    source = find_model(name)
    assert source.path
    source.path.mkdir(parents=True)
    (source.path / "config.json").write_text(json.dumps({}))
    message = refusal(lambda: load_weights(source))
    assert message.startswith(f"{source.path}: no such weights; run `seqmill fetch {name}`")


def test_untrained_weights_are_the_same_every_time() -> None:
    tensors = untrained_tensors(TINY)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == parameter_shapes(TINY)
    digest = hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()
    assert digest == UNTRAINED_DIGEST  # a change would change every user's trial embeddings


def test_untrained_activations_and_scores_are_sane() -> None:
    """After several layers, the residual stream and the scores, which are not scaled, neither vanish nor explode."""
    architecture = T5Architecture(6, 256, 4, key_dim=128, feed_forward_dim=1024)
    weights = Weights(architecture, untrained_tensors(architecture), "", False)
    model = make_model(weights, torch.float32, 301, "sdpa")
    for layer, hidden in model.hidden_states(one_pack(random_tokens([300])), tuple(range(7))):
        assert 0.5 < hidden.std() < 6, layer
    assert 0.5 < hidden.std() < 2
    scores, biases = scores_and_biases(model, hidden)
    assert 0.5 < scores.std() < 2
    assert 0.5 < biases.std() < 2


def scores_and_biases(model: T5Encoder, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last layer's scores without biases, and the biases."""
    layer = model.layers[-1]
    qkv = layer.qkv(layer.attention_norm.pre(hidden.clone(), None)).view(len(hidden), 3, -1, layer.head_dim)
    biases = make_biases("avx2", model.bucket_biases, model.architecture.max_distance, len(hidden))
    return torch.einsum("qhc,khc->hqk", qkv[:, 0], qkv[:, 1]), biases
