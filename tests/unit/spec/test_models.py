"""Model names and paths: their meaning, the names of their result folders, hints for typos."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seqmill.errors import SeqmillError
from seqmill.spec.architectures import Esm2Architecture, model_flop
from seqmill.spec.families import DNABERT_S, ESM2, ESMC, PROSTT5, PROTT5, Family
from seqmill.spec.models import (
    DNABERT_MODELS,
    ESM2_MODELS,
    MODELS,
    NAMES,
    T5_MODELS,
    UNTRAINED_TOKENIZER,
    WEIGHTS_FOLDER,
    find_model,
    is_hub_id,
    user_weights_folder,
)
from seqmill.spec.released import read_releases

NAME = "esm2_t6_8M_UR50D"

# Layers, width, heads, width of a head and of the feed-forward, as published with fair-esm 2.0.0 and esm 3.4.1, and in
# ProtTrans.
PUBLISHED = {
    "esm2_t6_8M_UR50D": (6, 320, 20, 16, 1280),
    "esm2_t12_35M_UR50D": (12, 480, 20, 24, 1920),
    "esm2_t30_150M_UR50D": (30, 640, 20, 32, 2560),
    "esm2_t33_650M_UR50D": (33, 1280, 20, 64, 5120),
    "esm2_t36_3B_UR50D": (36, 2560, 40, 64, 10240),
    "esm2_t48_15B_UR50D": (48, 5120, 40, 128, 20480),
    "esmc_300m": (30, 960, 15, 64, 2560),
    "esmc_600m": (36, 1152, 18, 64, 3072),
    "esmc_6b": (80, 2560, 40, 64, 6912),
    "prott5_xl_u50": (24, 1024, 32, 128, 16384),
    "prostt5": (24, 1024, 32, 128, 16384),
    "dnabert_s": (12, 768, 12, 64, 3072),
    "dnabert_2": (12, 768, 12, 64, 3072),
}
# Bytes of published weights, and of a parameter in them; ESM C's have a head (esm 3.4.1, `_esmc_lm_head`).
PUBLISHED_BYTES = {
    "esmc_300m": (1_332_036_392, 4),
    "esmc_600m": (2_300_205_696, 4),
    "prott5_xl_u50": (2_416_373_051, 2),
}


def refusal(name: str) -> str:
    with pytest.raises(SeqmillError) as caught:
        find_model(name)
    return str(caught.value)


def write_folder(folder: Path, model_type: str = "esm") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "model.safetensors").write_bytes(b"")  # it is not opened here
    return folder


def write_dnabert(folder: Path, weights: str = "pytorch_model.bin") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "alibi_starting_size": 512}))
    for name in ("tokenizer.json", weights):
        (folder / name).write_bytes(b"")  # they are not opened here
    return folder


def write_checkpoint(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")  # it is not opened here
    return path


def test_the_published_shapes() -> None:
    shapes = {name: (a.num_layers, a.hidden_dim, a.num_heads, a.head_dim, a.ffn_dim) for name, a in MODELS.items()}
    assert shapes == PUBLISHED
    for architecture in ESM2_MODELS.values():
        assert architecture.vocabulary == 33
        assert architecture.token_dropout
    for name, architecture in MODELS.items():
        assert architecture.inner_dim == (4096 if name in T5_MODELS else architecture.hidden_dim)


@pytest.mark.parametrize("name", PUBLISHED_BYTES)
def test_the_number_of_parameters_is_that_of_published_weights(name: str) -> None:
    architecture, (size, width) = MODELS[name], PUBLISHED_BYTES[name]
    d, vocabulary = architecture.hidden_dim, architecture.vocabulary
    head = d * d + 3 * d + (d + 1) * vocabulary if architecture.family == ESMC else 0
    rest = size - width * (architecture.num_parameters + head)
    print(name, rest)
    assert 0 < rest < 200_000  # names and places of the tensors


def test_the_floating_point_operations_of_each_family() -> None:
    """2 for each parameter of the layers' matrices and token, and 4 n n for each channel of the queries."""
    lengths = np.array([10, 3])
    for name, per_token, attention in (
        ("esm2_t6_8M_UR50D", 6 * 24 * 320**2, 6 * 4 * 320),
        ("esmc_300m", 30 * 2 * 960 * (4 * 960 + 3 * 2560), 30 * 4 * 960),
        ("prott5_xl_u50", 24 * 2 * 1024 * (4 * 4096 + 2 * 16384), 24 * 4 * 4096),
        ("dnabert_s", 12 * 32 * 768**2, 12 * 4 * 768),
    ):
        assert model_flop(MODELS[name], lengths) == 13 * per_token + 109 * attention, name


@pytest.mark.parametrize("name", MODELS)
def test_a_released_model(name: str) -> None:
    source = find_model(name)
    assert (source.name, source.kind, source.slug) == (name, "released", name)
    assert source.path == WEIGHTS_FOLDER / (f"{name}.pt" if name in ESM2_MODELS else name)
    assert source.architecture == MODELS[name]
    assert source.family == MODELS[name].family
    assert (source.tokenizer is None) == source.family.is_protein
    if name in ESM2_MODELS:
        assert source.files == [source.path]
    else:
        assert source.is_folder


@pytest.mark.parametrize("name", MODELS)
def test_an_untrained_model(name: str) -> None:
    source = find_model(f"untrained:{name}")
    assert (source.kind, source.slug, source.path) == ("untrained", f"untrained-{name}", None)
    assert source.architecture == MODELS[name]
    assert source.family == MODELS[name].family
    assert source.files == []
    assert (source.tokenizer is None) == source.family.is_protein


def write_released(name: str, folder: Path) -> Path:
    """Write files without content where those of a released model would be in a folder of weights."""
    if name in ESM2_MODELS:
        return write_checkpoint(folder / f"{name}.pt")
    for file in read_releases()[name].files:
        write_checkpoint(folder / name / file)
    if name == "esmc_6b":
        write_index(folder / name, *(file for file in read_releases()[name].files if file.startswith("model-")))
    return folder / name


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of weights; the working directory is next to it."""
    monkeypatch.setenv("SEQMILL_MODELS", str(tmp_path / "user"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "user"


@pytest.mark.parametrize("name", [NAME, "esmc_300m", "esmc_6b", "prott5_xl_u50", "dnabert_s"])
def test_where_released_weights_are_looked_for(user_folder: Path, name: str) -> None:
    nowhere = find_model(name)
    assert nowhere.path.parent == WEIGHTS_FOLDER
    assert not nowhere.is_on_disk
    in_user_folder = write_released(name, user_folder)
    assert (find_model(name).path, find_model(name).is_on_disk) == (in_user_folder, True)
    here = write_released(name, WEIGHTS_FOLDER)
    assert (find_model(name).path, find_model(name).is_on_disk) == (here, True)


def test_a_partial_folder_here_yields_to_a_whole_one_of_the_user(user_folder: Path) -> None:
    (write_released("dnabert_s", WEIGHTS_FOLDER) / "tokenizer.json").unlink()
    assert find_model("dnabert_s").path == WEIGHTS_FOLDER / "dnabert_s"
    whole = write_released("dnabert_s", user_folder)
    assert find_model("dnabert_s").path == whole


def write_shards(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "esmc"}))
    weight_map = {f"layers.{number}.weight": name for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def test_a_half_copied_folder_of_shards_is_not_on_this_disk(user_folder: Path) -> None:
    published = [file for file in read_releases()["esmc_6b"].files if file.startswith("model-")]
    assert len(published) == 6
    for names in (published, ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]):  # or of another layout
        here = write_shards(WEIGHTS_FOLDER / "esmc_6b", names)
        assert find_model("esmc_6b").is_on_disk
        (here / names[1]).unlink()
        assert not find_model("esmc_6b").is_on_disk
        whole = write_shards(user_folder / "esmc_6b", names)
        assert find_model("esmc_6b").path == whole
        for folder in (here, whole):
            shutil.rmtree(folder)


def test_a_released_folder_may_have_the_other_format(user_folder: Path) -> None:
    folder = WEIGHTS_FOLDER / "prott5_xl_u50"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    source = find_model("prott5_xl_u50")
    assert source.is_on_disk
    assert source.files == [folder / "config.json", folder / "model.safetensors"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SEQMILL_MODELS": "/weights", "XDG_CACHE_HOME": "/cache"}, "/weights"),
        ({"SEQMILL_MODELS": "~/weights"}, "/home/me/weights"),
        ({"XDG_CACHE_HOME": "/cache"}, "/cache/seqmill/models"),
        ({"SEQMILL_MODELS": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/seqmill/models"),
    ],
)
def test_the_user_s_folder(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("SEQMILL_MODELS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/me"} | variables).items():
        monkeypatch.setenv(name, value)
    assert user_weights_folder() == Path(expected)


def test_without_a_home_folder_weights_are_looked_for_here(user_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQMILL_MODELS", "~nobody-of-this-name/models")
    assert find_model(NAME).path == WEIGHTS_FOLDER / f"{NAME}.pt"


@pytest.mark.parametrize(
    ("hub_name", "name"),
    [
        ("facebook/esm2_t6_8M_UR50D", "esm2_t6_8M_UR50D"),
        ("Facebook/ESM2_t33_650m_UR50D", "esm2_t33_650M_UR50D"),
        ("zhihan1996/DNABERT-S", "dnabert_s"),
        ("zhihan1996/dnabert-2-117m", "dnabert_2"),
        ("biohub/ESMC-300M", "esmc_300m"),
        ("Biohub/ESMC-6B", "esmc_6b"),
        ("EvolutionaryScale/esmc-600m-2024-12", "esmc_600m"),
        ("Rostlab/prot_t5_xl_half_uniref50-enc", "prott5_xl_u50"),
        ("Rostlab/ProstT5", "prostt5"),
        ("Rostlab/ProstT5_fp16", "prostt5"),
    ],
)
def test_a_released_model_by_its_name_on_the_hub(user_folder: Path, hub_name: str, name: str) -> None:
    assert find_model(hub_name) == find_model(name)
    assert not is_hub_id(hub_name)
    folder = write_folder(Path(hub_name))  # a folder here is what the user means
    assert find_model(hub_name).path == folder


def test_another_name_on_the_hub_asks_for_a_fetch(user_folder: Path) -> None:
    message = refusal("lab/esm2-tuned")
    assert message.startswith("model lab/esm2-tuned: no such folder. ")
    assert re.search(r"run `\S*(seqmill|python).* lab/esm2-tuned` and give the folder that it prints", message)
    assert is_hub_id("lab/esm2-tuned")
    write_folder(Path("lab/esm2-tuned"))
    assert not is_hub_id("lab/esm2-tuned")
    for other in (
        "esm2-tuned",
        "lab/absent.pt",
        "../mine",
        "/lab/esm2",
        "a/b/c",
        "lab/",
        "lab/esm 2",
        f"lab/{'x' * 300}",
    ):
        assert not is_hub_id(other)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ESM2_MODELS])
def test_the_files_of_a_released_folder_are_those_of_its_source(name: str) -> None:
    """The workflow waits for these files before they exist."""
    files = find_model(name).files
    assert {path.name for path in files} == set(read_releases()[name].files)
    assert {path.parent for path in files} == {WEIGHTS_FOLDER / name}


@pytest.mark.parametrize("name", DNABERT_MODELS)
def test_a_nucleotide_model(name: str) -> None:
    source, folder = find_model(name), WEIGHTS_FOLDER / name
    assert (source.kind, source.family, source.slug, source.path) == ("released", DNABERT_S, name, folder)
    assert source.tokenizer == folder / "tokenizer.json"
    assert source.files == [folder / "config.json", folder / "tokenizer.json", folder / "pytorch_model.bin"]
    source = find_model(f"untrained:{name}")
    assert (source.kind, source.family, source.path, source.files) == ("untrained", DNABERT_S, None, [])
    assert source.tokenizer == UNTRAINED_TOKENIZER
    assert UNTRAINED_TOKENIZER.is_file()
    assert source.architecture == DNABERT_MODELS[name]


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
def test_a_nucleotide_model_folder(tmp_path: Path, weights: str) -> None:
    folder = write_dnabert(tmp_path / "mine", weights)
    source = find_model(str(folder))
    assert (source.kind, source.family, source.path, source.slug) == ("folder", DNABERT_S, folder, "mine")
    assert source.tokenizer == folder / "tokenizer.json"
    assert source.files == [folder / "config.json", folder / "tokenizer.json", folder / weights]


@pytest.mark.parametrize("absent", ["tokenizer.json", "pytorch_model.bin"])
def test_a_nucleotide_model_folder_that_lacks_a_file(tmp_path: Path, absent: str) -> None:
    folder = write_dnabert(tmp_path / "mine")
    (folder / absent).unlink()
    message = refusal(str(folder))
    assert str(folder) in message
    assert absent in message


def test_a_checkpoint_and_a_folder(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "my.model v2.pt")
    source = find_model(str(file))
    assert (source.kind, source.path, source.slug) == ("checkpoint", file, "my.model-v2")
    assert source.architecture is None
    assert source.files == [file]

    folder = write_folder(tmp_path / "esm2 (fine-tuned)")
    source = find_model(f"{folder}/")
    assert (source.kind, source.path, source.slug) == ("folder", folder, "esm2-fine-tuned-")
    assert (source.architecture, source.family, source.tokenizer) == (None, ESM2, None)
    assert source.files == [folder / name for name in ("config.json", "model.safetensors")]


def test_a_pth_file_is_of_esm_c(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "esmc_300m_2024_12_v0.pth")
    source = find_model(str(file))
    assert (source.kind, source.family, source.path, source.slug) == ("checkpoint", ESMC, file, file.stem)
    assert source.files == [file]
    assert find_model(str(write_checkpoint(tmp_path / "esm2.pt"))).family == ESM2


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"model_type": "esmc"}, ESMC),
        ({"model_type": "t5", "vocab_size": 128}, PROTT5),
        ({"model_type": "t5", "vocab_size": 150}, PROSTT5),
    ],
)
def test_the_family_of_a_protein_model_folder(tmp_path: Path, config: dict[str, Any], family: Family) -> None:
    folder = write_folder(tmp_path / "mine")
    (folder / "config.json").write_text(json.dumps(config))
    source = find_model(str(folder))
    assert (source.kind, source.family, source.architecture, source.tokenizer) == ("folder", family, None, None)
    assert source.files == [folder / "config.json", folder / "model.safetensors"]
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    if family == ESMC:
        assert "seqmill does not read pickled weights of ESM C" in refusal(str(folder))
    else:
        assert find_model(str(folder)).files == [folder / "config.json", folder / "pytorch_model.bin"]
    (folder / "pytorch_model.bin").unlink()
    message = refusal(str(folder))
    assert message.startswith(f"model {folder}: the folder has ")
    assert "model.safetensors" in message or "a .safetensors file" in message


@pytest.mark.parametrize("vocabulary", [32128, 32100, 144, 0, -1, "128", 128.5, None, [128]])
def test_other_models_of_t5_are_refused(tmp_path: Path, vocabulary: Any) -> None:
    """Those of t5-base (32,128 tokens) and Ankh (144) among them."""
    folder = write_folder(tmp_path / "mine")
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": vocabulary}))
    message = refusal(str(folder))
    assert message == (
        f"{folder / 'config.json'}: vocab_size is {vocabulary!r}; seqmill reads T5 with 128 (ProtT5) or 150 (ProstT5)"
    )


def write_index(folder: Path, *shards: str) -> Path:
    """Write shards and their index; keep the folder's model.safetensors."""
    for shard in shards:
        (folder / shard).write_bytes(b"")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"tensor {i}": shard for i, shard in enumerate(shards)}}))
    return index


@pytest.mark.parametrize("write", [write_folder, partial(write_dnabert, weights="model.safetensors")])
def test_a_single_file_has_priority_over_an_index_and_its_shards(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """As in transformers. Files that are not read are not rule inputs either."""
    folder = write(tmp_path / "mine")
    rest = [folder / name for name in ("config.json", "tokenizer.json") if (folder / name).exists()]
    for other in ("model-9.safetensors", "pytorch_model.bin"):
        (folder / other).write_bytes(b"")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = write_index(folder, *shards)
    source = find_model(str(folder))
    assert source.files == [*rest, folder / "model.safetensors"]
    (folder / "model.safetensors").unlink()
    assert source.files == [*rest, index, *(folder / shard for shard in shards)]
    (folder / shards[1]).unlink()
    message = refusal(str(folder))
    assert f"{folder / shards[1]}: no such file" in message
    assert str(index) in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not a JSON object"),
        ("[]", "holds a list"),
        ("{}", "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"x": 3}}', "has 3 for x"),
        ('{"weight_map": {"x": null, "y": "a.safetensors"}}', "has None for x"),
        ('{"weight_map": {"x": "../other/a.safetensors"}}', "'../other/a.safetensors' for x"),
        ('{"weight_map": {"x": "a.bin"}}', "'a.bin' for x"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_an_index_that_cannot_be_read(tmp_path: Path, text: str, expected: str) -> None:
    folder = write_folder(tmp_path / "mine")
    index = folder / "model.safetensors.index.json"
    index.write_text(text)
    find_model(str(folder))  # the index is not read
    (folder / "model.safetensors").unlink()
    message = refusal(str(folder))
    assert f"{index}: " in message
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ['{"a":' * 100_000, "[" * 100_000])
def test_a_config_nested_too_deeply(tmp_path: Path, text: str) -> None:
    folder = write_folder(tmp_path / "mine")
    (folder / "config.json").write_text(text)
    assert f"{folder / 'config.json'}: not a JSON object: it is nested too deeply" in refusal(str(folder))


def test_a_config_that_names_its_weights(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mine")
    (folder / "config.json").write_text(json.dumps({"model_type": "esm", "transformers_weights": "ema.safetensors"}))
    assert f"{folder / 'config.json'}: names its weights in transformers_weights" in refusal(str(folder))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_layers": float("inf")}, "num_layers is inf"),
        ({"num_layers": 6.5}, "num_layers is 6.5"),
        ({"num_layers": True}, "num_layers is True"),
        ({"hidden_dim": 10**9}, "hidden_dim is 1000000000"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": -20}, "num_heads is -20"),
        ({"num_heads": 7}, "num_heads is 7, which does not divide hidden_dim 320"),
        ({"num_heads": 320}, "heads are 1 wide, not an even number"),
    ],
)
def test_a_shape_that_no_model_can_have(shape: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        replace(MODELS[NAME], **shape)
    if "wide" not in expected:
        with pytest.raises(ValueError, match=re.escape(expected.replace("320", "768"))):
            replace(DNABERT_MODELS["dnabert_s"], **shape)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("esmc_300m", {"num_heads": 7}, "num_heads is 7, which does not divide hidden_dim 960"),
        ("esmc_300m", {"num_heads": 960}, "heads are 1 wide, not an even number"),
        ("esmc_300m", {"vocabulary": 0}, "vocabulary is 0"),
        ("prostt5", {"key_dim": 0}, "key_dim is 0"),
        ("prostt5", {"feed_forward_dim": 10**9}, "feed_forward_dim is 1000000000"),
        ("prostt5", {"buckets": -32}, "buckets is -32"),
        ("prostt5", {"max_distance": 12.5}, "max_distance is 12.5"),
        ("prostt5", {"buckets": 2}, "buckets is 2, not an even number from 4 on"),
        ("prostt5", {"max_distance": 8}, "max_distance is 8, which 32 buckets reach one by one"),
    ],
)
def test_a_shape_that_no_model_of_these_families_can_have(name: str, shape: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        replace(MODELS[name], **shape)


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_the_slug_of_a_folder_given_as_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    folder = write_folder(tmp_path / "mine")
    (folder / "x" / "y").mkdir(parents=True)
    monkeypatch.chdir(folder / below)
    dots = "/".join([".."] * len(Path(below).parts)) or "."
    assert find_model(dots).slug == "mine"
    assert find_model(f"{dots}/").slug == "mine"


def test_a_folder_named_like_a_model_is_not_that_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / NAME)
    assert find_model(NAME).kind == "released"
    assert find_model(f"./{NAME}").kind == "folder"


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("esm2_t6_8M", "esm2_t6_8M_UR50D"),
        ("esm2_t33_650M_UR50S", "esm2_t33_650M_UR50D"),
        ("ESM2_t36_3B_UR50D", "esm2_t36_3B_UR50D"),
        ("esm2-t12-35M-UR50D", "esm2_t12_35M_UR50D"),
        ("untrained:esm2_t6_8M", "untrained:esm2_t6_8M_UR50D"),
        ("facebook/esm2_t30_150M_UR50S", "esm2_t30_150M_UR50D"),
        ("dnabert", "dnabert_s"),
        ("DNABERT_S", "dnabert_s"),
        ("zhihan1996/DNABERT_S", "dnabert_s"),
        ("untrained:dnabert-s", "untrained:dnabert_s"),
        ("esmc-300m", "esmc_300m"),
        ("ESMC_600M", "esmc_600m"),
        ("prott5", "prott5_xl_u50"),
        ("Rostlab/ProstT5_fp32", "prostt5"),
        ("untrained:ProstT5", "untrained:prostt5"),
    ],
)
def test_a_typo_gets_a_hint(typo: str, meant: str) -> None:
    message = refusal(typo)
    assert f"model {typo}" in message.replace("'", "")
    assert f"did you mean {meant}?" in message


@pytest.mark.parametrize("name", ["", "resnet50", "untrained:", "untrained:resnet50"])
def test_an_unknown_name_gets_the_list(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_folder(tmp_path))  # '' must not mean this folder
    message = refusal(name)
    for known in NAMES:
        assert known in message


@pytest.mark.parametrize("name", ["absent.pt", "folder/absent.pt", "/absent/folder", "/absent.pt"])
def test_a_missing_path(name: str) -> None:
    message = refusal(name)
    assert f"model {name}: no such" in message
    assert "did you mean" not in message


def test_a_file_that_is_not_pt(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    message = refusal(str(file))
    assert f"model {file}: no such fair-esm .pt file, ESM C .pth file, or Hugging Face folder" in message


def test_a_folder_that_is_not_esm(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    other = write_folder(tmp_path / "other", "bert")
    for folder, expected in ((empty, "no config.json"), (other, "'bert'")):
        message = refusal(str(folder))
        assert str(folder) in message
        assert expected in message


@pytest.mark.parametrize("model_type", [None, 7, ["esm"], {"esm": 2}])
def test_a_folder_whose_model_type_is_no_text(tmp_path: Path, model_type: Any) -> None:
    folder = write_folder(tmp_path / "model", model_type)
    assert f"model_type is {model_type!r}; " in refusal(str(folder))


def test_an_architecture_is_compared_by_value() -> None:
    assert Esm2Architecture(6, 320, 20) == MODELS[NAME]
    assert Esm2Architecture(6, 320, 20, token_dropout=False) != MODELS[NAME]


def test_the_registry_is_light() -> None:
    """A workflow imports it hundreds of times, even where the worker's packages are not installed."""
    scripts = Path(__file__).parents[3] / "scripts"
    program = (
        "import sys; import seqmill.spec.models, seqmill.run.datasets, seqmill.fetch.weights; "
        "print(*sorted({'torch', 'numpy', 'h5py', 'pandas', 'zstandard'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", program], cwd=scripts, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == []
