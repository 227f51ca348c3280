"""Fetching ESM C, ProtT5, and ProstT5: folders of a commit on the Hugging Face Hub, small ones with seeded weights."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

import esmc_reference
import t5_reference
from hub_server import COMMIT, HubServer, served_models
from seqmill.errors import SeqmillError
from seqmill.fetch import fetch_model, retry
from seqmill.fetch.download import Unreachable
from seqmill.fetch.self_test import check_weights, self_test
from seqmill.fetch.weights import URL_VARIABLE, fetch_weights
from seqmill.model.weights import load_weights
from seqmill.spec.models import MODELS, find_model
from seqmill.spec.released import read_releases

REPOSITORY = "our-lab/published"
SEQUENCE = "MKTAYIAKQR"


@dataclass
class Release:
    """A model that a server publishes, and the facts about it."""

    name: str
    hub: HubServer
    folder: Path  # for the user's weights

    @property
    def files(self) -> dict[str, bytes]:
        return self.hub.models[REPOSITORY]

    @property
    def output(self) -> Path:
        return self.folder / self.name

    @property
    def facts(self) -> Path:
        return self.folder / "facts.json"

    def write_facts(self, unknown: tuple[str, ...] = (), **model: Any) -> None:
        """Write the digests of the published files, but those that are unknown."""
        found = {name: _fact(content) for name, content in self.files.items()}
        found |= {name: {"size": None} for name in unknown}
        source = {"repository": REPOSITORY, "commit": COMMIT, "files": found}
        self.facts.write_text(json.dumps({self.name: {"sources": [source], **model}}))

    def fetch(self) -> None:
        fetch_weights(self.name, self.output, self.facts)

    def record(self) -> dict[str, Any]:
        return json.loads(self.output.with_name(f"{self.name}.json").read_text())

    def assert_fetched(self) -> None:
        assert {path.name: path.read_bytes() for path in self.output.iterdir()} == self.files
        assert self.record()["files"] == {name: _fact(content) for name, content in self.files.items()}
        assert self.record()["source"] == f"{REPOSITORY} at commit {COMMIT} on Hugging Face"
        assert not self.part.exists()

    @property
    def part(self) -> Path:
        return self.output.with_name(f"{self.name}.part")


def _fact(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


CASES: dict[str, tuple[Any, Callable[[Path], Path]]] = {
    "esmc_300m": (esmc_reference.SMALL, esmc_reference.save_fused_folder),
    "esmc_6b": (esmc_reference.SMALL, lambda folder: esmc_reference.save_folder(folder, shard="800KB")),
    "prott5_xl_u50": (t5_reference.SMALL, t5_reference.save_pickle),
    "prostt5": (
        t5_reference.SMALL_PROSTT5,
        lambda folder: t5_reference.save_pickle(folder, t5_reference.SMALL_PROSTT5),
    ),
}


@pytest.fixture
def released(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Release]:
    name = request.param
    architecture, save = CASES[name]
    monkeypatch.setattr(retry, "WAITS", (0.01, 0.02, 0.03))
    monkeypatch.setitem(MODELS, name, architecture)  # else its 300 million weights would be needed
    monkeypatch.setenv("SEQMILL_MODELS", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)
    published = {path.name: path.read_bytes() for path in save(tmp_path / "published").iterdir()}
    files = {file: content for file, content in published.items() if file != "generation_config.json"}
    with served_models({REPOSITORY: files}) as hub:
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        found = Release(name, hub, tmp_path / "user")
        found.folder.mkdir()
        found.write_facts()
        yield found


def each(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("released", names, indirect=True)


def weights_of(released: Release) -> str:
    return max(released.files, key=lambda file: len(released.files[file]))


@each(*CASES)
def test_a_folder_is_fetched_once_and_is_the_model(released: Release) -> None:
    released.fetch()
    released.assert_fetched()
    source = find_model(released.name)
    assert (source.path, source.is_on_disk) == (released.output, True)
    assert load_weights(source).digest == released.record()["digest"]
    asked = len(released.hub.asked)
    assert asked == len(released.files)
    released.fetch()
    assert fetch_model(released.name).path == released.output
    assert len(released.hub.asked) == asked


@each("esmc_6b", "prott5_xl_u50")
def test_an_interrupted_download_continues(released: Release) -> None:
    """The server breaks off twice; an earlier program has left the beginning of a file."""
    file = weights_of(released)
    released.part.mkdir()
    (released.part / f"{file}.part").write_bytes(released.files[file][:1000])
    released.hub.cuts = 2
    released.fetch()
    released.assert_fetched()
    assert len(released.hub.ranges) == len(released.files) + 2
    assert next(filter(None, released.hub.ranges)) == "bytes=1000-"


@each(*CASES)
def test_only_damaged_weights_are_deleted(released: Release) -> None:
    file = weights_of(released)
    good = released.files[file]
    released.files[file] = bytes([*good[:-9], good[-9] ^ 1, *good[-8:]])
    with pytest.raises(SeqmillError, match=f"what was fetched is not {file} of {released.name} as published.* SHA256"):
        released.fetch()
    assert not released.output.exists()
    kept = {path.name for path in released.part.iterdir()}
    assert kept < released.files.keys()
    assert file not in kept
    released.files[file] = good
    before = len(released.hub.asked)
    released.fetch()
    released.assert_fetched()
    assert len(released.hub.asked) == before + len(released.files) - len(kept)


@each("esmc_6b")
def test_a_folder_that_lacks_a_shard_is_completed(released: Release) -> None:
    """As after an interruption while the files got their final names, or a copy that was broken off."""
    released.fetch()
    shards = sorted(file for file in released.files if file.startswith("model-"))
    assert len(shards) > 2
    (released.output / shards[1]).unlink()
    asked = len(released.hub.asked)
    released.fetch()
    released.assert_fetched()
    assert [line.rpartition("/")[2] for line in released.hub.asked[asked:]] == [shards[1]]


@each("esmc_300m", "prostt5")
def test_published_files_of_another_shape_are_refused(released: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, released.name, replace(MODELS[released.name], num_layers=2))
    with pytest.raises(SeqmillError, match=f"what was fetched is not {released.name} and was removed: .*num_layers=3"):
        released.fetch()
    assert not released.output.exists()
    assert not released.part.exists()


@each("prostt5")
def test_files_without_a_published_digest(released: Release, caplog: pytest.LogCaptureFixture) -> None:
    """The server states them for the pinned commit; they are recorded, and compared from then on."""
    released.write_facts(unknown=tuple(released.files))
    with caplog.at_level(logging.INFO, "seqmill"):
        released.fetch()
    released.assert_fetched()
    for name, content in released.files.items():
        said = f"sha256 of {name} at its pinned commit, as the server states: {_fact(content)['sha256']}"
        assert said in caplog.messages
    assert [line.split()[0] for line in released.hub.asked] == ["HEAD", "HEAD", "GET", "GET"]

    def look() -> tuple[str, bool]:
        (found,) = check_weights(released.facts)
        return found

    text, right = look()
    assert right
    assert "files and tensors are right" in text
    config = released.output / "config.json"
    config.write_text(config.read_text() + " ")
    text, right = look()
    assert not right
    assert f"{config}: not that of prostt5 as published: its SHA256 is" in text
    assert text.endswith("as fetched; remove it and fetch it again")
    released.output.with_name("prostt5.json").unlink()
    text, right = look()
    assert right
    assert "put there by hand" in text
    assert "no public page states a digest of pytorch_model.bin to compare with" in text


@each("prostt5")
def test_a_file_that_is_not_what_the_server_states(released: Release) -> None:
    released.write_facts(unknown=tuple(released.files))
    released.hub.stated["pytorch_model.bin"] = "0" * 64
    with pytest.raises(SeqmillError, match=f"not pytorch_model.bin of prostt5 as published .* not {'0' * 64}"):
        released.fetch()
    assert not (released.part / "pytorch_model.bin").exists()
    blob = f"blob {len(released.files['config.json'])}\0".encode() + released.files["config.json"]
    released.hub.stated = {"config.json": hashlib.sha1(blob, usedforsecurity=False).hexdigest()}  # as of small files
    released.fetch()
    released.assert_fetched()


@each("prostt5")
def test_a_server_that_states_no_digest(released: Release) -> None:
    released.write_facts(unknown=tuple(released.files))
    released.hub.stated["config.json"] = "W/of-another-kind"
    with pytest.raises(SeqmillError, match="the server states no digest of this file"):
        released.fetch()
    del released.files["config.json"]
    with pytest.raises(Unreachable, match=r"config\.json: the server answers 404"):
        released.fetch()
    assert not any(line.startswith("GET") for line in released.hub.asked)


@each("prostt5", "prott5_xl_u50")
def test_a_mirror_of_a_file_without_a_published_digest(released: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could check weights. All that is read from config.json must fit the known shape."""
    monkeypatch.setenv(URL_VARIABLE, f"{released.hub.url}/{REPOSITORY}/resolve/{COMMIT}")
    if released.name == "prott5_xl_u50":
        released.write_facts(unknown=("config.json",))
        files = dict(released.files)
        released.files.update({f"{released.name}/{name}": content for name, content in files.items()})
        released.fetch()
        assert {path.name: path.read_bytes() for path in released.output.iterdir()} == files
        return
    released.write_facts(unknown=tuple(released.files))
    with pytest.raises(SeqmillError, match=r"digest of prostt5.s pytorch_model\.bin, so that of a mirror can't be"):
        released.fetch()
    assert released.hub.asked == []


@each("esmc_300m")
def test_published_numbers_of_tokens_that_are_not_the_first(released: Release) -> None:
    tokens = esmc_reference.tokens_of(SEQUENCE)
    hidden = esmc_reference.reference_hidden(esmc_reference.seeded_model(), tokens, torch.bfloat16)[-1]
    numbers = hidden.float()[1:4, :6].tolist()
    case = {"sequence": SEQUENCE, "tokens": tokens, "first_token": 1, "hidden": numbers}
    test = {"from": "transformers in bfloat16", "tolerance": 0.06, "cases": [case]}
    released.write_facts(self_test=test)
    released.fetch()
    assert "computes the published numbers (transformers in bfloat16) to" in released.record()["self_test"]
    case["first_token"] = 0
    released.write_facts(self_test=test)
    (found,) = check_weights(released.facts)
    assert not found[1]
    assert "not the trained weights of esmc_300m" in found[0]


@pytest.mark.full
@each("esmc_300m")
def test_the_published_numbers_of_esm_c_refuse_untrained_weights(released: Release) -> None:
    source = find_model("untrained:esmc_300m")
    with pytest.raises(SeqmillError, match=r"not the trained weights .* at most 0.01 is allowed"):
        self_test(source, load_weights(source), read_releases()["esmc_300m"].published)


@each("prostt5")
@pytest.mark.parametrize(
    ("fact", "commit", "expected"),
    [
        ({"size": 3}, None, "config.json has no digest, and no commit pins it"),
        ({"sha256": "0", "md5": "0"}, COMMIT, "a file has more than one digest"),
    ],
)
def test_facts_that_pin_nothing(released: Release, fact: dict[str, Any], commit: str | None, expected: str) -> None:
    source = {"repository": REPOSITORY, "commit": commit, "files": {"config.json": fact}}
    released.facts.write_text(json.dumps({"prostt5": {"sources": [source]}}))
    with pytest.raises(SeqmillError, match=f"not facts of released models: .*{expected}"):
        released.fetch()
    assert released.hub.asked == []
