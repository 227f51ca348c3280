"""ESM C's weights: every layout gives the same tensors, a seed gives the same bits, other files are refused."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EsmcForMaskedLM

from esmc_reference import State, older_layout, random_tokens, save_folder, seeded_model, seeded_state
from pack_parity import make_model, one_pack
from seqmill.errors import SeqmillError
from seqmill.model.esmc import parameter_shapes
from seqmill.model.weights import Weights, load_weights, untrained_tensors
from seqmill.spec.architectures import EsmcArchitecture
from seqmill.spec.families import ESMC
from seqmill.spec.models import ESMC_MODELS, find_model

TINY = EsmcArchitecture(num_layers=2, hidden_dim=64, num_heads=1)
UNTRAINED_DIGEST = "b138110da06cd7ad5c8248aefe8691416172cb4119473613dd0d3d81bb5df334"


@pytest.fixture
def state() -> State:
    return seeded_state(TINY)


@pytest.fixture
def folder(state: State, tmp_path: Path) -> Path:
    return save_folder(tmp_path / "folder", TINY, state)


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
    file = folder / "model.safetensors"
    state = load_file(file)
    save_file({name: tensor for name, tensor in (state | changed).items() if name not in removed}, file)


def test_a_folder_gives_the_values_of_the_reference(folder: Path, state: State) -> None:
    weights = load(folder)
    assert weights.trained
    assert weights.architecture == TINY
    assert {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()} == parameter_shapes(TINY)
    for ours, theirs in {
        "embed.weight": "embed_tokens.weight",
        "layers.0.attention_norm.bias": "layers.0.input_layernorm.bias",
        "layers.1.q_norm.weight": "layers.1.self_attn.q_norm.weight",
        "layers.1.k_norm.weight": "layers.1.self_attn.k_norm.weight",
        "layers.0.out.weight": "layers.0.self_attn.o_proj.weight",
        "layers.1.ffn_norm.weight": "layers.1.post_attention_layernorm.weight",
        "layers.1.down.weight": "layers.1.mlp.down_proj.weight",
        "final_norm.weight": "norm.weight",
    }.items():
        assert torch.equal(weights.tensors[ours], state[theirs]), ours
    gate, up = weights.tensors["layers.1.gated.weight"].chunk(2)
    assert torch.equal(gate, state["layers.1.mlp.gate_proj.weight"])
    assert torch.equal(up, state["layers.1.mlp.up_proj.weight"])


def save_shards(folder: Path, state: State) -> Path:
    save_folder(folder, TINY, state, shard="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def save_with_head(folder: Path, state: State) -> Path:
    encoder = seeded_model(TINY, state)
    whole = EsmcForMaskedLM(encoder.config)
    whole.esmc = encoder
    whole.save_pretrained(folder)
    assert "lm_head.decoder.weight" in load_file(folder / "model.safetensors")
    return folder


def save_older(path: Path, state: State, prefix: str = "") -> Path:
    """Write a .pth file of the esm package's first releases, with a head."""
    older = {prefix + name: tensor for name, tensor in older_layout(state).items()}
    torch.save(older | {"sequence_head.0.weight": torch.zeros(64, 64), "sequence_head.3.bias": torch.zeros(64)}, path)
    return path


def save_as_published(folder: Path, state: State) -> Path:
    """Write a folder of the layout in which Biohub published ESM C: Transformer Engine's names, and sizes by others."""
    engine = {
        "attn.layernorm_qkv.0.": "attn.layernorm_qkv.layer_norm_",
        "attn.layernorm_qkv.1.": "attn.layernorm_qkv.",
        "ffn.0.": "ffn.layer_norm_",
        "ffn.1.": "ffn.fc1_",
        "ffn.3.": "ffn.fc2_",
    }
    published = {"lm_head.0.weight": torch.zeros(64, 64), "lm_head.3.bias": torch.zeros(64)}
    for name, tensor in older_layout(state).items():
        for old, new in engine.items():
            name = name.replace(old, new)
        published[f"esmc.{name}"] = tensor
    for part in ("attn.layernorm_qkv", "attn.out_proj", "ffn"):
        published[f"esmc.transformer.blocks.0.{part}._extra_state"] = torch.zeros(0, dtype=torch.uint8)
    folder.mkdir()
    save_file(published, folder / "model.safetensors")
    config = {
        "architectures": ["ESMCForMaskedLM"],
        "classifier_dropout": 0.1,
        "d_model": TINY.hidden_dim,
        "dtype": "float32",
        "initializer_range": 0.02,
        "mask_token_id": 32,
        "model_type": "esmc",
        "n_heads": TINY.num_heads,
        "n_layers": TINY.num_layers,
        "pad_token_id": 1,
        "tie_word_embeddings": False,
        "transformers_version": "4.57.6",
        "vocab_size": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_older_names(folder: Path, state: State) -> Path:
    save_folder(folder, TINY, state)
    save_file(older_layout(state), folder / "model.safetensors")
    return folder


def save_with_frequencies(folder: Path, state: State) -> Path:
    save_folder(folder, TINY, state)
    change_tensors(folder, {"rotary_emb.inv_freq": torch.ones(32), "rotary_emb.original_inv_freq": torch.ones(32)})
    return folder


@pytest.mark.parametrize(
    "save",
    [
        save_shards,
        save_with_head,
        lambda path, state: save_older(path.with_suffix(".pth"), state),
        lambda path, state: save_older(path.with_suffix(".pth"), state, prefix="esmc."),
        save_as_published,
        save_older_names,
        save_with_frequencies,
    ],
)
def test_every_layout_gives_the_same_weights(
    folder: Path, state: State, tmp_path: Path, save: Callable[[Path, State], Path]
) -> None:
    found, expected = load(save(tmp_path / "other", state)), load(folder)
    assert found.architecture == expected.architecture
    assert found.digest == expected.digest
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, expected.tensors[name]), name


def test_half_precision_keeps_its_dtype_and_has_its_own_digest(folder: Path, state: State, tmp_path: Path) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in state.items()}
    found = load(save_folder(tmp_path / "halves", TINY, halves))
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.bfloat16}
    assert found.digest != load(folder).digest


def test_missing_and_unknown_tensors_are_listed(folder: Path) -> None:
    change_tensors(folder, {"layers.0.mlp.bias": torch.zeros(2)}, removed=("layers.1.self_attn.q_norm.weight",))
    message = refusal(lambda: load(folder))
    assert message == (
        f"{folder}: not the tensors of ESM C: missing layers.1.self_attn.q_norm.weight; unknown layers.0.mlp.bias"
    )


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("layers.0.self_attn.k_proj.weight", (32, 64), (64, 64)),  # fewer heads of keys
        ("layers.1.mlp.up_proj.weight", (512, 64), (256, 64)),
        ("layers.1.self_attn.q_norm.weight", (32,), (64,)),  # a norm of each head
        ("embed_tokens.weight", (33, 64), (64, 64)),
    ],
)
def test_a_wrong_shape(folder: Path, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    change_tensors(folder, {name: torch.zeros(shape)})
    assert refusal(lambda: load(folder)) == f"{folder}: {name} has shape {shape}, not {wanted}"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; ESM C has 'silu'"),
        ({"attention_bias": True}, "attention_bias is True; ESM C has False"),
        ({"mlp_bias": True}, "mlp_bias is True; ESM C has False"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06; ESM C has 1e-05"),
        ({"rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"}}, "with a base of 10000"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}}, "with a base of 10000"),
        ({"rope_parameters": [1e4]}, r"rope_parameters are [10000.0]; ESM C rotates"),
        ({"intermediate_size": 256 * 4}, "intermediate_size is 1024; ESM C has 256 for hidden_size 64"),
        ({"num_hidden_layers": 10**9}, "num_layers is 1000000000"),
        ({"num_attention_heads": 0}, "num_heads is 0"),
        ({"num_attention_heads": 3}, "num_heads is 3, which does not divide hidden_dim 64"),
        ({"hidden_size": "wide"}, "not the shape of a model"),
        ({"vocab_size": None}, "vocabulary is None"),
    ],
)
def test_a_configuration_of_another_model(folder: Path, values: dict[str, Any], expected: str) -> None:
    change_config(folder, **values)
    message = refusal(lambda: load(folder))
    assert message.startswith(f"{folder / 'config.json'}: ")
    assert expected in message


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size"])
def test_a_configuration_without_a_size(folder: Path, key: str) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    assert refusal(lambda: load(folder)) == f"{path}: lacks '{key}'"


def test_damaged_safetensors(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert refusal(lambda: load(folder)).startswith(f"{file}: damaged or not safetensors: ")


class Trap:
    """Creates a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def test_code_in_a_pickle_is_not_executed(state: State, tmp_path: Path) -> None:
    sprung, file = tmp_path / "sprung", tmp_path / "trap.pth"
    torch.save(older_layout(state) | {"trap": Trap(sprung)}, file)
    torch.load(file, weights_only=False)
    assert sprung.is_dir()  # the trap works
    sprung.rmdir()
    message = refusal(lambda: load(file))
    assert not sprung.exists()
    assert message.startswith(f"{file}: not loaded as a checkpoint of ESM C: its pickle calls for ")
    assert "mkdir" in message
    assert "weights_only" not in message


@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, {"epoch": 3}, 7])
def test_a_pickle_of_something_else(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pth")
    assert "not a checkpoint of ESM C: it holds more than tensors" in refusal(lambda: load(tmp_path / "other.pth"))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda state: state.clear(), "it has no table of tokens"),
        (lambda state: state.pop("embed.weight"), "it has no table of tokens"),
        (lambda state: state.update({"embed.weight": torch.zeros(64)}), "it has no table of tokens"),
        (lambda state: state.update({"embed.weight": torch.zeros(64, 7)}), "hidden_dim is 7, not a multiple of 64"),
        (lambda state: state.update({"embed.weight": torch.zeros(64, 100)}), "hidden_dim is 100, not a multiple of 64"),
        (
            lambda state: state.update({f"x.blocks.{number}.": torch.ones(1) for number in range(1001)}),
            "num_layers is 1001",
        ),
        (lambda state: state.pop("transformer.blocks.1.attn.q_ln.weight"), "missing transformer.blocks.1.attn.q_ln"),
        (
            lambda state: state.update({"transformer.blocks.0.ffn.1.weight": torch.zeros(128, 64)}),
            "transformer.blocks.0.ffn.1.weight has shape (128, 64), not (512, 64)",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if ".blocks." in name],
            "num_layers is 0",
        ),
        (lambda state: state.update({"transformer.blocks.x.ffn.1.weight": torch.zeros(2)}), "missing transformer.bl"),
    ],
)
def test_a_checkpoint_that_is_not_esm_c(state: State, tmp_path: Path, spoil: Callable[[State], Any], expected: str):
    older, file = older_layout(state), tmp_path / "other.pth"
    spoil(older)
    torch.save(older, file)
    message = refusal(lambda: load(file))
    assert message.startswith(f"{file}: ")
    assert expected in message


@pytest.mark.parametrize("kept", [0, 7, 5000])
def test_a_truncated_checkpoint(state: State, tmp_path: Path, kept: int) -> None:
    file = save_older(tmp_path / "cut.pth", state)
    file.write_bytes(file.read_bytes()[:kept])
    assert refusal(lambda: load(file)).startswith(f"{file}: ")


@pytest.mark.parametrize("name", ESMC_MODELS)
def test_the_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no such weights" in refusal(lambda: load_weights(find_model(name)))
    source = find_model(f"untrained:{name}")
    assert (source.family, source.architecture) == (ESMC, ESMC_MODELS[name])
    save_folder(find_model(name).path, TINY)
    assert f"but {name} is" in refusal(lambda: load_weights(find_model(name)))  # the folder has another size


def test_untrained_weights_are_the_same_every_time() -> None:
    tensors = untrained_tensors(TINY)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == parameter_shapes(TINY)
    digest = hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()
    assert digest == UNTRAINED_DIGEST  # a change would change every user's trial embeddings


def test_untrained_activations_and_scores_are_sane() -> None:
    """After several layers, the residual stream and the scores neither vanish nor explode."""
    architecture = EsmcArchitecture(6, 256, 4)
    weights = Weights(architecture, untrained_tensors(architecture), "", False)
    model = make_model(weights, torch.float32, 302, "sdpa")
    pack = one_pack(random_tokens([300]))
    for layer, hidden in model.hidden_states(pack, tuple(range(7))):
        assert 0.5 < hidden.std() < 12, layer
    assert 0.5 < hidden.std() < 2
    assert 0.5 < spread_of_scores(model, hidden) < 2


def spread_of_scores(model: Any, hidden: torch.Tensor) -> float:
    """Return the standard deviation of the last layer's scores, before the rotation, which keeps lengths."""
    layer = model.layers[-1]
    qkv = layer.qkv(layer.attention_norm.pre(hidden.clone(), None)).view(len(hidden), 3, -1)
    query, key = (
        torch.nn.functional.layer_norm(part, part.shape[-1:], weight).view(len(hidden), -1, layer.head_dim)
        for part, weight in zip(qkv.unbind(1)[:2], (layer.q_norm, layer.k_norm), strict=True)
    )
    return (torch.einsum("qhc,khc->hqk", query, key) * layer.head_dim**-0.5).std().item()
