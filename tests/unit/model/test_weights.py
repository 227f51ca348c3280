"""Weights: three formats give the same tensors, a seed gives the same bits, other files are refused."""

import argparse
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import esm
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EsmForMaskedLM, EsmModel

from hugging_face import hugging_face_model
from reference import ALPHABET, fair_esm_hidden, fair_esm_model, save_checkpoint
from seqmill.errors import SeqmillError
from seqmill.index.letters import ESM2_ALPHABET, ProteinLetters
from seqmill.model.esm2 import ESM2, parameter_shapes
from seqmill.model.pack import Pack
from seqmill.model.weights import Weights, load_weights, untrained_tensors
from seqmill.spec.architectures import Esm2Architecture
from seqmill.spec.models import MODELS, ModelSource, find_model
from sequences import random_sequences, relative_error

NAME = "esm2_t6_8M_UR50D"
SMALL = replace(MODELS[NAME], num_layers=1)
UNTRAINED_DIGEST = "ee934a87a90ac8abd3f4b77b6ccf7bc6eccfacf780eefafcddf26c5f03ea7f29"


def rename_layer_norms(folder: Path, old_to_new: dict[str, str]) -> None:
    file = folder / "model.safetensors"
    state = {}
    for name, tensor in load_file(file).items():
        stem, _, kind = name.rpartition(".")
        state[f"{stem}.{old_to_new.get(kind, kind)}" if stem.endswith("LayerNorm") else name] = tensor
    save_file(state, file)


@pytest.fixture(scope="module")
def reference() -> esm.ESM2:
    return fair_esm_model(MODELS[NAME])


@pytest.fixture(scope="module")
def from_checkpoint(reference: esm.ESM2, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    path = save_checkpoint(reference, tmp_path_factory.mktemp("checkpoint") / "model.pt")
    return load_weights(find_model(str(path)))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with one layer."""
    return save_checkpoint(fair_esm_model(SMALL), tmp_path_factory.mktemp("small") / "small.pt")


@pytest.fixture(scope="module")
def kept_small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small_folder")
    hugging_face_model(fair_esm_model(SMALL)).save_pretrained(path)
    return path


@pytest.fixture
def small_folder(kept_small_folder: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder with one layer, for tests to damage."""
    return shutil.copytree(kept_small_folder, tmp_path / "folder")


def assert_equal(found: Weights, expected: Weights) -> None:
    assert found.architecture == expected.architecture
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, expected.tensors[name]), name
    assert found.digest == expected.digest


def our_hidden(weights: Weights, sequence: str) -> np.ndarray:
    tokens = ESM2_ALPHABET.before + ProteinLetters().tokens(sequence.encode()) + ESM2_ALPHABET.after
    pack = Pack.from_tokens(np.frombuffer(tokens, np.uint8), np.array([len(tokens)]))
    return ESM2(weights.architecture, weights.tensors, torch.float32, len(tokens))(pack).numpy()


@torch.no_grad()
def hugging_face_hidden(model: Any, sequence: str) -> np.ndarray:
    tokens = torch.tensor([[ALPHABET.cls_idx, *ALPHABET.encode(sequence), ALPHABET.eos_idx]])
    return model(tokens).last_hidden_state[0].numpy()


def refusal(path: Path | str) -> str:
    with pytest.raises(SeqmillError) as caught:
        load_weights(find_model(str(path)))
    return str(caught.value)


def test_a_checkpoint_has_the_values_of_the_reference(reference: esm.ESM2, from_checkpoint: Weights) -> None:
    state = reference.state_dict()
    tensors = from_checkpoint.tensors
    assert from_checkpoint.trained
    assert from_checkpoint.architecture == MODELS[NAME]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == parameter_shapes(MODELS[NAME])
    assert torch.equal(tensors["embed.weight"], state["embed_tokens.weight"])
    assert torch.equal(tensors["layers.5.ffn_norm.bias"], state["layers.5.final_layer_norm.bias"])
    query, key, value = tensors["layers.3.qkv.weight"].chunk(3)
    for found, name in ((query, "q"), (key, "k"), (value, "v")):
        assert torch.equal(found, state[f"layers.3.self_attn.{name}_proj.weight"])


@pytest.mark.parametrize(
    ("cls", "shard"),
    [(EsmModel, None), (EsmForMaskedLM, None), (EsmModel, "8MB"), (EsmForMaskedLM, "8MB")],
)
def test_a_hugging_face_folder_equals_the_checkpoint(
    reference: esm.ESM2,
    from_checkpoint: Weights,
    cls: type[EsmModel] | type[EsmForMaskedLM],
    shard: str | None,
    tmp_path: Path,
) -> None:
    sizes = {"max_shard_size": shard} if shard else {}
    hugging_face_model(reference, cls).save_pretrained(tmp_path, safe_serialization=True, **sizes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(shard)
    source = find_model(str(tmp_path))
    assert source.kind == "folder"
    assert_equal(load_weights(source), from_checkpoint)


@pytest.mark.parametrize("kinds", [("weight", "bias"), ("gamma", "beta")])
def test_both_names_of_layer_norms(small: Path, small_folder: Path, kinds: tuple[str, str]) -> None:
    """The published folders have weight and bias; transformers 5 saves gamma and beta."""
    weight, bias = kinds
    rename_layer_norms(small_folder, {"weight": weight, "gamma": weight, "bias": bias, "beta": bias})
    assert f"encoder.layer.0.LayerNorm.{weight}" in load_file(small_folder / "model.safetensors")
    assert_equal(load_weights(find_model(str(small_folder))), load_weights(find_model(str(small))))


def test_other_tensors_of_published_folders_are_ignored(small: Path, small_folder: Path) -> None:
    file = small_folder / "model.safetensors"
    others = {
        "lm_head.decoder.weight": torch.zeros(33, 320),
        "esm.embeddings.position_embeddings.weight": torch.zeros(1026, 320),
        "esm.embeddings.position_ids": torch.arange(1026)[None],
        "esm.encoder.layer.0.attention.self.rotary_embeddings.inv_freq": torch.ones(8),
    }
    save_file({f"esm.{name}": tensor for name, tensor in load_file(file).items()} | others, file)
    assert_equal(load_weights(find_model(str(small_folder))), load_weights(find_model(str(small))))


@pytest.mark.parametrize(("cls", "token_dropout"), [(EsmModel, True), (EsmForMaskedLM, True), (EsmModel, False)])
def test_the_forward_agrees_with_transformers_and_fair_esm(
    cls: type[EsmModel] | type[EsmForMaskedLM], token_dropout: bool, tmp_path: Path
) -> None:
    reference = fair_esm_model(replace(MODELS[NAME], token_dropout=token_dropout))
    hugging_face_model(reference, cls).save_pretrained(tmp_path, safe_serialization=True)
    weights = load_weights(find_model(str(tmp_path)))
    theirs = EsmModel.from_pretrained(tmp_path).eval()
    assert weights.architecture.token_dropout == token_dropout
    errors = []
    for sequence in random_sequences([300, 65, 7, 1]):
        found = our_hidden(weights, sequence)
        errors.append(relative_error(found, hugging_face_hidden(theirs, sequence)))
        errors.append(relative_error(found, fair_esm_hidden(reference, sequence)))
    print(f"{cls.__name__}: worst relative error {max(errors):.2e}")
    assert max(errors) < 5e-5


def test_half_precision_keeps_its_dtype_and_has_its_own_digest(small: Path, tmp_path: Path) -> None:
    halves = save_checkpoint(fair_esm_model(SMALL).half(), tmp_path / "half.pt")
    found = load_weights(find_model(str(halves)))
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float16}
    assert found.digest != load_weights(find_model(str(small))).digest


def test_the_digest_sees_one_bit(small: Path, tmp_path: Path) -> None:
    model = fair_esm_model(SMALL)
    again = load_weights(find_model(str(save_checkpoint(model, tmp_path / "again.pt"))))
    assert again.digest == load_weights(find_model(str(small))).digest
    bias = model.layers[0].fc2.bias.data
    bias[7] = torch.nextafter(bias[7], torch.tensor(9.0))
    changed = load_weights(find_model(str(save_checkpoint(model, tmp_path / "changed.pt"))))
    assert changed.digest != again.digest


def test_untrained_weights_are_the_same_every_time() -> None:
    first, second = (load_weights(find_model(f"untrained:{NAME}")) for _ in range(2))
    assert_equal(first, second)
    assert first.digest == UNTRAINED_DIGEST  # a change would change every user's trial embeddings
    assert not first.trained
    assert first.architecture == MODELS[NAME]
    assert {name: tuple(tensor.shape) for name, tensor in first.tensors.items()} == parameter_shapes(MODELS[NAME])


def test_untrained_tensors_do_not_depend_on_each_other() -> None:
    tensors = untrained_tensors(MODELS[NAME])
    for name, tensor in untrained_tensors(SMALL).items():
        assert torch.equal(tensor, tensors[name]), name
    assert not torch.equal(tensors["layers.0.fc1.weight"], tensors["layers.1.fc1.weight"])


def test_untrained_activations_have_a_spread_of_about_one() -> None:
    hidden = our_hidden(load_weights(find_model(f"untrained:{NAME}")), random_sequences([200])[0])
    assert np.isfinite(hidden).all()
    assert 0.5 < hidden.std() < 2


Content = dict[str, Any]
PREFIX = "encoder.sentence_encoder."


def lack_a_tensor(content: Content) -> None:
    del content["model"][PREFIX + "layers.0.fc1.bias"]


def have_another_tensor(content: Content) -> None:
    content["model"][PREFIX + "layers.0.adapter.weight"] = torch.zeros(2)


def have_another_layer(content: Content) -> None:
    content["cfg"]["model"].encoder_layers = 2


def have_a_larger_vocabulary(content: Content) -> None:
    content["model"][PREFIX + "embed_tokens.weight"] = torch.zeros(35, SMALL.hidden_dim)


def have_a_wrong_projection(content: Content) -> None:
    content["model"][PREFIX + "layers.0.self_attn.k_proj.weight"] = torch.zeros(SMALL.hidden_dim, 7)


def have_projections_of_uneven_height(content: Content) -> None:
    d = SMALL.hidden_dim
    content["model"][PREFIX + "layers.0.self_attn.q_proj.bias"] = torch.zeros(d - 1)
    content["model"][PREFIX + "layers.0.self_attn.k_proj.bias"] = torch.zeros(d + 1)


def have_a_number_for_a_tensor(content: Content) -> None:
    content["model"][PREFIX + "layers.0.fc1.bias"] = 3


def have_a_number_for_a_name(content: Content) -> None:
    content["model"][7] = torch.zeros(2)


def have_a_list_of_tensors(content: Content) -> None:
    content["model"] = [torch.zeros(2)]


def change_a_matrix(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Content], None]:
    def spoil(content: Content) -> None:
        key = PREFIX + "layers.0.fc1.weight"
        content["model"][key] = change(content["model"][key])

    return spoil


def set_shape(**shape: Any) -> Callable[[Content], None]:
    return lambda content: vars(content["cfg"]["model"]).update(shape)


def have_no_shape(content: Content) -> None:
    content["args"] = content.pop("cfg")["model"]  # as in ESM-1b's checkpoints


def have_words_for_numbers(content: Content) -> None:
    content["cfg"]["model"].encoder_layers = "six"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lack_a_tensor, "missing layers.0.fc1.bias; unknown none"),
        (have_another_tensor, "missing none; unknown layers.0.adapter.weight"),
        (have_another_layer, "missing layers.1.fc1.bias, .* and 8 more; unknown none"),
        (have_a_larger_vocabulary, r"embed_tokens.weight has shape \(35, 320\), not \(33, 320\)"),
        (have_a_wrong_projection, r"layers.0.self_attn.k_proj.weight has shape \(320, 7\), not \(320, 320\)"),
        (have_projections_of_uneven_height, r"layers.0.self_attn.q_proj.bias has shape \(319,\), not \(320,\)"),
        (have_a_number_for_a_tensor, "more than tensors"),
        (have_a_number_for_a_name, "named 7"),
        (have_a_list_of_tensors, "more than tensors"),
        (change_a_matrix(lambda t: t.to("meta")), "layers.0.fc1.weight is a meta tensor"),
        (change_a_matrix(lambda t: t.to_sparse()), "layers.0.fc1.weight is a sparse tensor"),
        (change_a_matrix(lambda t: t.to_sparse_csr()), "layers.0.fc1.weight is a sparse tensor"),
        (
            change_a_matrix(lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
            "layers.0.fc1.weight is a quantized tensor",
        ),
        (change_a_matrix(lambda t: t.to(torch.int8)), "layers.0.fc1.weight is of torch.int8"),
        (change_a_matrix(lambda t: t.to(torch.complex64)), "layers.0.fc1.weight is of torch.complex64"),
        (change_a_matrix(lambda t: t.to(torch.float8_e4m3fn)), "layers.0.fc1.weight is of torch.float8_e4m3fn"),
        (set_shape(encoder_attention_heads=0), "num_heads is 0"),
        (set_shape(encoder_attention_heads=3), "num_heads is 3, which does not divide"),
        (set_shape(encoder_attention_heads=320), "heads are 1 wide"),
        (set_shape(encoder_layers=10**9), "num_layers is 1000000000"),
        (set_shape(encoder_layers=float("inf")), "num_layers is inf"),
        (have_no_shape, "no cfg.model"),
        (have_words_for_numbers, "'six'"),
    ],
)
def test_a_checkpoint_that_is_not_esm2(
    small: Path, tmp_path: Path, spoil: Callable[[Content], None], expected: str
) -> None:
    content = torch.load(small, weights_only=False)
    spoil(content)
    path = tmp_path / "spoiled.pt"
    torch.save(content, path)
    message = refusal(path)
    assert str(path) in message
    assert re.search(expected, message), message
    assert "\n" not in message


class Trap:
    """Creates a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("where", ["model", "cfg", "plain pickle"])
def test_code_in_a_pickle_is_not_executed(small: Path, tmp_path: Path, where: str) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / "trap.pt"
    if where == "plain pickle":
        path.write_bytes(pickle.dumps(Trap(sprung)))
        pickle.loads(path.read_bytes())
    else:
        content = torch.load(small, weights_only=False)
        content[where]["trap" if where == "model" else "model"] = Trap(sprung)
        torch.save(content, path)
        torch.load(path, weights_only=False)
    assert sprung.is_dir()  # the trap works
    sprung.rmdir()

    message = refusal(path)
    assert not sprung.exists()
    assert str(path) in message
    assert "weights_only" not in message  # PyTorch's advice on how to execute the file
    assert where == "plain pickle" or "mkdir" in message


def test_a_custom_class_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "class.pt"
    torch.save({"cfg": {"model": argparse.Namespace(trap=Esm2Architecture(1, 2, 1))}, "model": {}}, path)
    message = refusal(path)
    assert "Esm2Architecture" in message
    assert "weights_only" not in message


@pytest.mark.parametrize("kept", [0, 10, 0.5, -1])
def test_a_truncated_checkpoint(small: Path, tmp_path: Path, kept: float) -> None:
    path = tmp_path / "truncated.pt"
    content = small.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept == 0.5 else int(kept)])
    message = refusal(path)
    assert f"{path}: cannot be loaded" in message
    assert "truncated" in message


def test_a_text_named_pt(tmp_path: Path) -> None:
    path = tmp_path / "notes.pt"
    path.write_text("These are no weights.\n" * 50)
    assert f"{path}: cannot be loaded as a fair-esm checkpoint: it is truncated, or not a file of" in refusal(path)


def test_a_model_that_was_not_fetched(tmp_path: Path) -> None:
    path = tmp_path / f"{NAME}.pt"
    with pytest.raises(SeqmillError) as caught:
        load_weights(ModelSource(NAME, "released", MODELS[NAME], path))
    message = str(caught.value)
    assert str(path) in message
    assert re.search(f"no such weights; run `.*fetch.* {NAME}`, or put the model's checkpoint file there", message)


def test_weights_whose_architecture_does_not_fit_the_name(small: Path) -> None:
    with pytest.raises(SeqmillError) as caught:
        load_weights(ModelSource(NAME, "released", MODELS[NAME], small))
    assert str(small) in str(caught.value)
    assert NAME in str(caught.value)
    assert "num_layers=1," in str(caught.value)
    assert "num_layers=6," in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("position_embedding_type", "absolute", "'absolute'"),
        ("emb_layer_norm_before", True, "emb_layer_norm_before is True"),
        ("hidden_act", "relu", "'relu'"),
        ("layer_norm_eps", 1e-12, "1e-12"),
        ("model_type", "bert", "'bert'"),
        ("model_type", None, "model_type is None"),
        ("intermediate_size", 1024, "ESM-2 has 1280 for hidden_size 320"),
        ("num_hidden_layers", None, "not the shape"),
        ("num_hidden_layers", "six", "'six'"),
        ("num_hidden_layers", 2, "missing encoder.layer.1"),
        ("num_hidden_layers", 10**9, "num_layers is 1000000000"),
        ("num_hidden_layers", float("inf"), "num_layers is inf"),
        ("num_attention_heads", 0, "num_heads is 0"),
        ("num_attention_heads", 3, "num_heads is 3, which does not divide"),
        ("num_attention_heads", -1, "num_heads is -1"),
        ("hidden_size", "absent", "lacks 'hidden_size'"),
    ],
)
def test_a_config_that_is_not_esm2(small_folder: Path, key: str, value: object, expected: str) -> None:
    config = small_folder / "config.json"
    content = json.loads(config.read_text())
    if value == "absent":
        del content[key]
    else:
        content[key] = value
    config.write_text(json.dumps(content))
    message = refusal(small_folder)
    assert str(small_folder) in message
    assert expected in message


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", "\xff"])
def test_a_config_that_is_not_json(small_folder: Path, text: str) -> None:
    config = small_folder / "config.json"
    config.write_bytes(text.encode("latin-1"))
    assert f"{config}: not a JSON object" in refusal(small_folder)


def test_a_folder_without_config(small_folder: Path) -> None:
    (small_folder / "config.json").unlink()
    assert "has no config.json" in refusal(small_folder)


def test_a_folder_with_only_pickled_weights(small_folder: Path, tmp_path: Path) -> None:
    (small_folder / "model.safetensors").unlink()
    sprung = tmp_path / "sprung"
    torch.save(Trap(sprung), small_folder / "pytorch_model.bin")
    message = refusal(small_folder)
    assert "the folder has no .safetensors file" in message
    assert "pickled" in message
    assert not sprung.exists()


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_safetensors_file(small_folder: Path, kept: int) -> None:
    file = small_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert f"{file}: damaged or not safetensors" in refusal(small_folder)


@pytest.mark.parametrize("what", ["missing", "unknown", "shape"])
def test_a_folder_whose_tensors_are_not_esm2(small_folder: Path, what: str) -> None:
    file = small_folder / "model.safetensors"
    state = load_file(file)
    if what == "missing":
        del state["encoder.emb_layer_norm_after.bias"]
    elif what == "unknown":
        state["classifier.weight"] = torch.zeros(2)
    else:
        state["encoder.layer.0.attention.self.value.weight"] = torch.zeros(320, 321)
    save_file(state, file)
    message = refusal(small_folder)
    expected = {
        "missing": "missing encoder.emb_layer_norm_after.bias; unknown none",
        "unknown": "missing none; unknown classifier.weight",
        "shape": "attention.self.value.weight has shape (320, 321), not (320, 320)",
    }
    assert str(small_folder) in message
    assert expected[what] in message


def test_a_single_file_is_read_instead_of_an_older_index_with_its_shards(
    small: Path, small_folder: Path, tmp_path: Path
) -> None:
    """As in transformers: https://github.com/huggingface/transformers, modeling_utils.py."""
    older = fair_esm_model(SMALL, seed=8)
    hugging_face_model(older).save_pretrained(tmp_path / "older", safe_serialization=True, max_shard_size="2MB")
    for file in (tmp_path / "older").glob("model*"):
        shutil.copy(file, small_folder)
    theirs = EsmModel.from_pretrained(small_folder).eval()
    weights = load_weights(find_model(str(small_folder)))
    assert_equal(weights, load_weights(find_model(str(small))))
    sequence = random_sequences([40])[0]
    assert relative_error(our_hidden(weights, sequence), hugging_face_hidden(theirs, sequence)) < 5e-5
    (small_folder / "model.safetensors").unlink()
    older = load_weights(find_model(str(save_checkpoint(older, tmp_path / "older.pt"))))
    assert_equal(load_weights(find_model(str(small_folder))), older)


def test_a_shard_that_was_not_copied(small_folder: Path) -> None:
    (small_folder / "model.safetensors").rename(small_folder / "model-00001-of-00002.safetensors")
    index = small_folder / "model.safetensors.index.json"
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index.write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))
    assert f"{small_folder / shards[1]}: no such file" in refusal(small_folder)
