"""Model names and paths: their meaning, the names of their result folders, hints for typos."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from seqmill.errors import SeqmillError
from seqmill.spec.families import DNABERT_S, ESM2
from seqmill.spec.models import (
    DNABERT_MODELS,
    MODELS,
    NAMES,
    UNTRAINED_TOKENIZER,
    WEIGHTS_FOLDER,
    Esm2Architecture,
    find_model,
    is_hub_id,
    user_weights_folder,
)

NAME = "esm2_t6_8M_UR50D"

# Layers, width and heads, as published with fair-esm 2.0.0.
PUBLISHED = {
    "esm2_t6_8M_UR50D": (6, 320, 20),
    "esm2_t12_35M_UR50D": (12, 480, 20),
    "esm2_t30_150M_UR50D": (30, 640, 20),
    "esm2_t33_650M_UR50D": (33, 1280, 20),
    "esm2_t36_3B_UR50D": (36, 2560, 40),
    "esm2_t48_15B_UR50D": (48, 5120, 40),
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
    assert {name: (a.num_layers, a.hidden_dim, a.num_heads) for name, a in MODELS.items()} == PUBLISHED
    for architecture in MODELS.values():
        assert architecture.vocabulary == 33
        assert architecture.token_dropout
        assert architecture.head_dim * architecture.num_heads == architecture.hidden_dim
        assert architecture.ffn_dim == 4 * architecture.hidden_dim


@pytest.mark.parametrize("name", MODELS)
def test_a_released_model(name: str) -> None:
    source = find_model(name)
    assert (source.name, source.kind, source.slug) == (name, "released", name)
    assert source.path == WEIGHTS_FOLDER / f"{name}.pt"
    assert source.architecture == MODELS[name]
    assert source.files == [source.path]
    assert source.tokenizer is None


@pytest.mark.parametrize("name", MODELS)
def test_an_untrained_model(name: str) -> None:
    source = find_model(f"untrained:{name}")
    assert (source.kind, source.slug, source.path) == ("untrained", f"untrained-{name}", None)
    assert source.architecture == MODELS[name]
    assert source.files == []
    assert source.tokenizer is None


def write_released(name: str, folder: Path) -> Path:
    """Write empty files where those of a released model would be in a folder of weights."""
    return write_checkpoint(folder / f"{name}.pt") if name in MODELS else write_dnabert(folder / name)


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of weights; the working directory is next to it."""
    monkeypatch.setenv("SEQMILL_MODELS", str(tmp_path / "user"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "user"


@pytest.mark.parametrize("name", [NAME, "dnabert_s"])
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
    assert f"model {file}: no such fair-esm .pt file or Hugging Face folder" in refusal(str(file))


def test_a_folder_that_is_not_esm(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    other = write_folder(tmp_path / "other", "bert")
    for folder, expected in ((empty, "no config.json"), (other, "'bert'")):
        message = refusal(str(folder))
        assert str(folder) in message
        assert expected in message


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
