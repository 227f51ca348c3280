"""Fetching models of the Hugging Face Hub: `seqmill fetch owner/name` with huggingface_hub and a server of its API."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import esmc_reference
import t5_reference
from hub_server import FORBIDDEN, GATED, HubServer, served_models
from hugging_face import hugging_face_model
from pipeline import IMPATIENT, SCRIPTS
from reference import fair_esm_model, save_checkpoint
from seqmill.model.weights import load_weights
from seqmill.spec.architectures import Esm2Architecture
from seqmill.spec.models import find_model

NAME = "our-lab/esm2-tuned"
SMALL = Esm2Architecture(2, 64, 4)
PICKLE = "pytorch_model.bin"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small ESM-2 as transformers saves it, in two files, with files that seqmill does not need."""
    folder = tmp_path_factory.mktemp("tuned")
    hugging_face_model(fair_esm_model(SMALL)).save_pretrained(folder, max_shard_size="100KB")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sum(name.endswith(".safetensors") for name in files) > 1
    return {**files, PICKLE: b"a pickle", "README.md": b"# Tuned", "onnx/model.safetensors": b"another format"}


@pytest.fixture
def hub(tuned: dict[str, bytes]) -> Iterator[HubServer]:
    with served_models({NAME: tuned}) as server:
        yield server


def fetch(hub: HubServer, folder: Path, name: str = NAME, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `seqmill fetch` with short waits and empty caches in a folder; the Hub's own cache is below `folder`/hub."""
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hub"), "SEQMILL_MODELS": str(folder / "models")}
    environment["PYTHONPATH"] = IMPATIENT
    command = [sys.executable, SCRIPTS / "fetch_weights.py", name]
    return subprocess.run(command, cwd=folder, env=environment | variables, capture_output=True, text=True)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line of a refusal."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    (line,) = done.stderr.splitlines()
    return line


def folder_in(done: subprocess.CompletedProcess[str]) -> Path:
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    said, _, folder = line.rpartition(": ")
    assert said == f"{NAME}: give this folder as the model"
    return Path(folder)


def test_the_folder_that_it_prints_is_the_model(hub: HubServer, tuned: dict[str, bytes], tmp_path: Path) -> None:
    folder = folder_in(fetch(hub, tmp_path))
    wanted = {name for name in tuned if name == "config.json" or name.startswith("model")}
    assert {path.name for path in folder.iterdir()} == wanted
    assert hub.sent == sorted(wanted)  # each once, no pickle
    checkpoint = save_checkpoint(fair_esm_model(SMALL), tmp_path / "tuned.pt")
    expected, found = load_weights(find_model(str(checkpoint))), load_weights(find_model(str(folder)))
    assert found.architecture == SMALL
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


@pytest.mark.parametrize("reference", [esmc_reference, t5_reference], ids=["ESM C", "T5"])
def test_a_model_of_another_family(tmp_path: Path, reference: ModuleType) -> None:
    """In several files, as transformers saves it; a T5's pickle with its decoder is not fetched."""
    saved = reference.save_folder(tmp_path / "saved", shard="100KB")
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    with served_models({NAME: {**files, PICKLE: b"a pickle", "spiece.model": b"a tokenizer"}}) as hub:
        folder = folder_in(fetch(hub, tmp_path))
        assert hub.sent == sorted(files.keys() - {"generation_config.json"})
    found = find_model(str(folder))
    assert found.family == reference.SMALL.family
    assert load_weights(found).digest == load_weights(find_model(str(saved))).digest


def test_what_was_fetched_serves_offline_and_is_not_fetched_again(hub: HubServer, tmp_path: Path) -> None:
    folder = folder_in(fetch(hub, tmp_path))
    sent = hub.sent
    assert folder_in(fetch(hub, tmp_path)) == folder
    assert hub.sent == sent
    asked = len(hub.asked)
    assert folder_in(fetch(hub, tmp_path, HF_HUB_OFFLINE="1")) == folder
    assert len(hub.asked) == asked


def test_fetch_model_keeps_the_name_and_leaves_torch_alone(hub: HubServer, tmp_path: Path) -> None:
    program = """
import sys
from seqmill.fetch import fetch_model
source = fetch_model(sys.argv[1])
print(source.name, source.kind, source.slug, source.path.is_dir(), "torch" in sys.modules)
"""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PYTHONPATH": str(SCRIPTS)}
    command = [sys.executable, "-c", program, NAME]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [NAME, "folder", "esm2-tuned", "True", "False"], done.stderr


@pytest.mark.parametrize("answer", [GATED, FORBIDDEN], ids=["401", "403"])
def test_a_gated_model(hub: HubServer, tmp_path: Path, answer: tuple[int, str]) -> None:
    hub.refusals[NAME] = answer
    line = refusal(fetch(hub, tmp_path))
    assert f"model {NAME}: its owner asks for consent: agree on https://huggingface.co/{NAME}, then run" in line


def test_a_missing_model(hub: HubServer, tmp_path: Path) -> None:
    line = refusal(fetch(hub, tmp_path, "our-lab/absent"))
    assert "model our-lab/absent: neither a folder here nor a public model on the Hugging Face Hub" in line


def test_no_network(hub: HubServer, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    *waits, line = done.stderr.splitlines()
    assert done.returncode == 1
    assert [wait.partition(": ")[2] for wait in waits] == ["[Errno 111] Connection refused; trying again in 0 s"] * 2
    assert f"model {NAME}: cannot be fetched from the Hugging Face Hub: [Errno 111] Connection refused" in line
    line = refusal(fetch(hub, tmp_path, HF_HUB_OFFLINE="1"))
    assert f"model {NAME}: cannot be fetched from the Hugging Face Hub: " in line
    assert "offline mode is enabled" in line


def test_a_hub_in_trouble_is_asked_again(hub: HubServer, tmp_path: Path) -> None:
    hub.troubles = [503, 429]
    done = fetch(hub, tmp_path)
    assert folder_in(done).is_dir()
    assert [line.partition("the server answers ")[2] for line in done.stderr.splitlines()] == [
        "503 Service Unavailable; trying again in 0 s",
        "429 Too Many Requests; trying again in 0 s",
    ]


def test_a_name_that_the_hub_cannot_have(hub: HubServer, tmp_path: Path) -> None:
    assert "model our-lab/a--b: " in refusal(fetch(hub, tmp_path, "our-lab/a--b"))
    assert hub.asked == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": {"model_type": "llama"}, "model.safetensors": None}, "model_type is 'llama'"),
        ({"model.safetensors": None}, "no config.json"),
        ({"config.json": {"model_type": "esm"}, PICKLE: None}, "no .safetensors files, and seqmill fetches no pickled"),
    ],
    ids=["another kind", "no config", "pickles only"],
)
def test_a_model_that_seqmill_cannot_read_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, files: dict[str, object], expected: str
) -> None:
    with served_models({NAME: {name: json.dumps(content).encode() for name, content in files.items()}}) as hub:
        line = refusal(fetch(hub, tmp_path))
    assert f"model {NAME} of the Hugging Face Hub: " in line
    assert expected in line
    assert {"model.safetensors", PICKLE}.isdisjoint(hub.sent)
